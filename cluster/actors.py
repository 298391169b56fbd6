"""Prefill nodes, decode nodes and expert shards as actors: a plain object each, and heartbeats."""

import asyncio
import gc
import time
from typing import Any

import torch

from cluster.heartbeat import Heartbeat, host_and_pid, member_name
from cluster.membership import DRAINING, READY, STARTING, Member, View
from cluster.place import Place
from decode.config import DecodeConfig
from decode.node import DecodeNode
from experts.client import RemoteExperts
from experts.config import DispatchConfig, ShardConfig
from experts.shard import ExpertShard
from kernels.model.checkpoint import Checkpoint
from kernels.model.transformer import Transformer
from prefill.config import PrefillConfig
from prefill.node import PrefillNode

DRAIN_S = 600.0
DRAIN_POLL_S = 0.1
NOTICED_S = 0.6  # in which gateways hear that a node drains
QUIET_S = 0.5


class NodeActor:
    """A prefill or decode node; subclasses say which."""

    kind = ""

    async def __init__(self, place: Place, coordinator: Any):
        torch.set_num_threads(place.config.threads_per_actor)
        self.name = member_name(self.kind)
        self.state = STARTING
        self.loaded_share = 0.0
        self.node: PrefillNode | DecodeNode | None = None
        timeout_s = place.config.experts.dispatch_timeout_s
        config = DispatchConfig(self.name, place.secret, timeout_s, host=host_and_pid()["host"])
        self.experts = RemoteExperts(config)
        self.heartbeat = Heartbeat(coordinator, self.describe, self.on_view)
        self.heartbeat.start()
        await asyncio.to_thread(self._load, place)

    def _load(self, place: Place) -> None:
        checkpoint = Checkpoint(place.config.model.folder)
        transformer = Transformer.from_checkpoint(
            checkpoint, compute_dtype(place), self.experts, self._progress
        )
        self.node = self.make_node(place, transformer)
        self.node.experts_epoch = lambda: self.experts.epoch
        self.node.start()
        gc.freeze()
        self.state = READY

    def _progress(self, done: int, total: int) -> None:
        self.loaded_share = done / total

    def make_node(self, place: Place, transformer: Transformer) -> PrefillNode | DecodeNode:
        """The node itself."""
        raise NotImplementedError

    def describe(self) -> Member:
        """This actor, for the coordinator."""
        node = self.node if self.state != STARTING else None
        return Member(
            self.name,
            self.kind,
            node.endpoint.address if node else "",
            self.state,
            loaded_share=self.loaded_share,
            report=node.report() if node else None,
            **host_and_pid(),
        )

    async def on_view(self, view: View) -> None:
        """Go by a newer placement."""
        if view.placement_in_force is not None:
            self.experts.adopt(view.placement_in_force)

    async def check_health(self) -> None:
        """Raises if the node's thread has died, so that Serve starts another."""
        if self.node is not None and not self.node.is_alive:
            raise RuntimeError(f"{self.name} has stopped computing")

    async def __del__(self) -> None:
        """Take nothing new, finish what is here, then go."""
        self.state = DRAINING
        await self.heartbeat.announce()
        if self.node is not None:
            await asyncio.sleep(NOTICED_S)
            await drained(self.node)
        await self.heartbeat.stop()
        if self.node is not None:
            await asyncio.to_thread(self.node.close)
        self.experts.close()


class PrefillActor(NodeActor):
    """One prefill node."""

    kind = "prefill"

    def make_node(self, place: Place, transformer: Transformer) -> PrefillNode:
        """The prefill node as configured."""
        section = place.config.prefill
        config = PrefillConfig(
            self.name,
            place.address(self.name),
            place.secret,
            section.latents_bytes,
            section.step_tokens_max,
            section.requests_max,
            section.micro_batches,
        )
        return PrefillNode(config, transformer)


class DecodeActor(NodeActor):
    """One decode node."""

    kind = "decode"

    def make_node(self, place: Place, transformer: Transformer) -> DecodeNode:
        """The decode node as configured."""
        section = place.config.decode
        config = DecodeConfig(
            self.name,
            place.address(self.name),
            place.secret,
            section.latents_bytes,
            section.requests_max,
            section.micro_batches,
            place.config.transport.lease_s,
        )
        return DecodeNode(config, transformer)


class ShardActor:
    """One expert shard; it loads what the placement gives it."""

    kind = "experts"

    def __init__(self, place: Place, coordinator: Any):
        torch.set_num_threads(place.config.threads_per_actor)
        self.name = member_name("shard")
        self.state = READY
        self.loaded_share = 0.0
        checkpoint = Checkpoint(place.config.model.folder)
        self.shard = ExpertShard(
            ShardConfig(self.name, place.address(self.name), place.secret), checkpoint, compute_dtype(place)
        )
        self.shard.start()
        self.heartbeat = Heartbeat(coordinator, self.describe, self.on_view)
        self.heartbeat.start()

    def describe(self) -> Member:
        """This actor, for the coordinator."""
        return Member(
            self.name,
            self.kind,
            self.shard.address,
            self.state,
            loaded_share=self.loaded_share,
            report=self.shard.report(),
            **host_and_pid(),
        )

    async def on_view(self, view: View) -> None:
        """Load what a newer placement gives this shard."""
        if view.placement is not None and view.placement.epoch > self.shard.epoch:
            await asyncio.to_thread(self.shard.adopt, view.placement, self._progress, view.placement_in_force)
            self.loaded_share = 1.0
        self.shard.forget(view.nodes_epoch)

    def _progress(self, done: int, total: int) -> None:
        self.loaded_share = done / total

    async def check_health(self) -> None:
        """Raises if the shard's thread has died, so that Serve starts another."""
        if not self.shard.is_alive:
            raise RuntimeError(f"{self.name} has stopped computing")

    async def __del__(self) -> None:
        """Stay until other shards have taken over and no node asks any more, then go."""
        self.state = DRAINING
        await self.heartbeat.announce()
        await replaced(self.name, self.heartbeat)
        await unasked(self.shard)
        await self.heartbeat.stop()
        await asyncio.to_thread(self.shard.close)


def compute_dtype(place: Place) -> torch.dtype:
    """The type that everything is computed in."""
    return getattr(torch, place.config.model.compute_dtype)


async def drained(node: PrefillNode | DecodeNode) -> None:
    """Wait until a node has no requests."""
    end_s = time.monotonic() + DRAIN_S
    while node.is_alive and time.monotonic() < end_s:
        report = node.report()
        if report.requests_running_count + report.requests_waiting_count == 0:
            return
        await asyncio.sleep(DRAIN_POLL_S)


async def replaced(name: str, heartbeat: Heartbeat) -> None:
    """Wait until the placement in force does without a shard, or nobody is left to take over or to say so."""
    end_s = time.monotonic() + DRAIN_S
    while time.monotonic() < end_s and heartbeat.is_answered:
        placement = heartbeat.view.placement_in_force
        is_placed = placement is not None and any(shard.name == name for shard in placement.shards)
        if not is_placed or all(shard.state == DRAINING for shard in heartbeat.view.of_kind("experts")):
            return
        await asyncio.sleep(DRAIN_POLL_S)


async def unasked(shard: ExpertShard) -> None:
    """Wait until a shard has had no dispatch for a while."""
    end_s = time.monotonic() + DRAIN_S
    before, now = -1, shard.report().dispatches_count
    while before != now and time.monotonic() < end_s:
        await asyncio.sleep(QUIET_S)
        before, now = now, shard.report().dispatches_count
