"""Prefill nodes, decode nodes and expert shards as actors: plain objects, and heartbeats."""

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from cluster.device import check_numbers, device_of
from cluster.heartbeat import Heartbeat, host_and_pid, member_name
from cluster.logs import begin_logs
from cluster.place import Place
from cluster.post import DRAIN_POLL_S, DRAIN_S, Post
from cluster.tracing import start_tracing, stop_tracing
from cluster.view import DRAINING, READY, STARTING, Member, View
from experts.config import ShardConfig
from experts.homes import homes_fewest_count
from experts.shard import ExpertShard
from kernels.model.checkpoint import Checkpoint
from kernels.model.moe import NoExperts
from kernels.model.transformer import Transformer

QUIET_S = 0.5
SWITCH_S = 0.0005  # after which the thread that computes asks others for the interpreter
ROLE_DRAIN_S = 3.0  # other nodes go on with what takes longer, by the tokens so far


class NodeActor:
    """A process of the prefill or decode pool; subclasses say which.

    It loads the attention half once and keeps it, whatever kind of node serves from it: the coordinator may
    ask for the other kind, which is faster than starting a process.
    """

    pool = ""

    async def __init__(self, place: Place, coordinator: Any):
        begin_process(self.pool, place)
        self._place = place
        self._coordinator = coordinator
        self._changing: asyncio.Task | None = None
        self._is_ending = False
        self._transformer: Transformer | None = None
        self.posts = [self._post(kind) for kind in self._kinds_at_start()]
        await asyncio.to_thread(self._load)

    def _kinds_at_start(self) -> tuple[str, ...]:
        is_both = self.pool == "decode" and self._place.config.decode.reads_prompts
        return ("prefill", "decode") if is_both else (self.pool,)

    def _post(self, kind: str) -> Post:
        return Post(kind, self.pool, self._place, self._coordinator, self._change_role)

    def _load(self) -> None:
        checkpoint = Checkpoint(self._place.config.model.folder)
        device = device_of(self._place.config)
        check_numbers(checkpoint.config, self._place.config, device)
        self._transformer = Transformer.from_checkpoint(
            checkpoint,
            compute_dtype(self._place),
            NoExperts(),
            self._progress,
            device,
            keeps_fp8=device != "cpu",
        )
        for post in self.posts:
            post.open(self._transformer)

    def _progress(self, done: int, total: int) -> None:
        for post in self.posts:
            post.loaded_share = done / total

    def _change_role(self, kind: str) -> None:
        is_free = self._changing is None or self._changing.done()
        if len(self.posts) == 1 and is_free and not self._is_ending:
            self._changing = asyncio.get_running_loop().create_task(self._become(kind))

    async def _become(self, kind: str) -> None:
        """Serve as the other kind of node from now on; what is not finished soon goes on elsewhere."""
        post = self._post(kind)  # announced before the old one leaves, so that nobody misses this process
        await self.posts.pop().close(ROLE_DRAIN_S)
        gc.unfreeze()  # the old node's latents are to go before the new ones come
        gc.collect()
        self.posts.append(post)
        if not self._is_ending:
            await asyncio.to_thread(post.open, self._transformer)

    async def check_health(self) -> None:
        """Raises if a node's thread has died, so that Serve starts another process."""
        dead = [post.name for post in self.posts if post.has_died]
        if dead:
            raise RuntimeError(f"{', '.join(dead)} stopped computing")
        if self._changing is not None and self._changing.done():
            self._changing.result()

    async def __del__(self) -> None:
        """Take nothing new, finish what is here, then go."""
        self._is_ending = True
        if self._changing is not None:
            await asyncio.wait([self._changing])
        ends = await asyncio.gather(*(post.close() for post in self.posts), return_exceptions=True)
        for error in filter(None, ends):  # once all have ended, whatever one of them raised
            raise error


class PrefillActor(NodeActor):
    """A process of the prefill pool."""

    pool = "prefill"


class DecodeActor(NodeActor):
    """A process of the decode pool."""

    pool = "decode"


class ShardActor:
    """One expert shard; it loads what the placement gives it."""

    kind = pool = "experts"

    def __init__(self, place: Place, coordinator: Any):
        self.name = member_name("shard")
        begin_process(self.name, place)
        self.loaded_share = 0.0
        self._is_leaving = False
        self._replicas_min = place.config.experts.replicas_min
        checkpoint = Checkpoint(place.config.model.folder)
        self._has_layers = bool(checkpoint.config.moe_layers)
        address = place.tensors_address(self.name) or place.address(self.name)
        self.shard = ExpertShard(
            ShardConfig(self.name, address, place.secret, place.address(f"{self.name}-weights")),
            checkpoint,
            compute_dtype(place),
            device_of(place.config),
        )
        self.shard.start()
        self.heartbeat = Heartbeat(coordinator, self.describe, self.on_view)
        self.heartbeat.start()
        endpoint = place.config.operations.traces_endpoint
        self._tracing = start_tracing(endpoint, self.kind, self.name, self.shard.spans)

    def describe(self) -> Member:
        """This actor, for the coordinator: ready once it holds experts, and leaving if it cannot compute."""
        report = self.shard.report()
        is_leaving = self._is_leaving or not self.shard.is_alive
        is_ready = report.experts_count > 0 or not self._has_layers
        return Member(
            self.name,
            self.kind,
            self.shard.address,
            DRAINING if is_leaving else READY if is_ready else STARTING,
            loaded_share=self.loaded_share,
            report=report,
            **host_and_pid(),
        )

    async def on_view(self, view: View) -> None:
        """Let go of what no node asks for any more, and with that room load what is newly placed here."""
        self.shard.forget(view.nodes_epoch)
        if view.placement is None or view.placement.epoch <= self.shard.epoch:
            return
        alive = {member.name for member in view.of_kind(self.kind)}
        is_urgent = self._urgency(view)
        given = (view.placement, self._progress, view.placement_in_force, alive, is_urgent)
        await asyncio.to_thread(self.shard.adopt, *given)
        self.loaded_share = 1.0
        await self.heartbeat.announce()  # before the next placement hides that this one was loaded

    def _urgency(self, view: View) -> Callable[[], bool]:
        """Whether what a view has this shard load is waited for: by tokens, leaving shards, or a placement.

        Nor can it wait where one more death might leave an expert without the homes that it shall have.
        """
        stay = {member.name for member in view.of_kind(self.kind) if member.state != DRAINING}
        in_force, homes_min = view.placement_in_force, min(self._replicas_min, len(stay))
        is_awaited = in_force is None or homes_fewest_count(in_force, stay) < homes_min

        def is_urgent() -> bool:
            newest = self.heartbeat.view.placement
            is_overtaken = newest is not None and newest.epoch > view.placement.epoch
            return is_awaited or is_overtaken or self._is_leaving

        return is_urgent

    def _progress(self, done: int, total: int) -> None:
        self.loaded_share = done / total

    async def check_health(self) -> None:
        """Raises if the shard's thread has died, so that Serve starts another."""
        if not self.shard.is_alive:
            raise RuntimeError(f"{self.name} has stopped computing")

    async def __del__(self) -> None:
        """Stay until other shards have taken over and no node asks any more, then go."""
        self._is_leaving = True
        await self.heartbeat.announce()
        await replaced(self.name, self.heartbeat)
        await unasked(self.shard)
        await self.heartbeat.stop()
        await asyncio.to_thread(self.shard.close)
        await stop_tracing(self._tracing)


def begin_process(name: str, place: Place) -> None:
    """What a process that computes begins with: its logs are called `name`."""
    torch.set_num_threads(place.config.threads_per_actor)
    sys.setswitchinterval(SWITCH_S)
    begin_logs(name, place.config.operations.json_logs)


def compute_dtype(place: Place) -> torch.dtype:
    """The type that everything is computed in."""
    return getattr(torch, place.config.model.compute_dtype)


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
