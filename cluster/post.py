"""One node's post in an actor's process, from its first heartbeat to its last."""

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

from cluster.config import DecodeSection
from cluster.heartbeat import FAREWELL_S, Heartbeat, host_and_pid, member_name
from cluster.place import Place
from cluster.tracing import start_tracing, stop_tracing
from cluster.view import DRAINING, READY, STARTING, Member, View
from decode.config import DecodeConfig
from decode.node import DecodeNode
from experts.client import RemoteExperts
from experts.config import DispatchConfig
from experts.staged import StagedExperts
from kernels.model.transformer import Transformer
from prefill.config import PrefillConfig
from prefill.node import PrefillNode

DRAIN_S = 600.0
DRAIN_POLL_S = 0.1
NOTICED_S = 0.6  # in which gateways hear that a node drains
STEP_TIMEOUTS = 4  # a step waits for many dispatches, of which hardly any takes all of its time
STEP_S_MIN = 120.0  # that a step may take in any case: dispatches given up soon make none shorter

Node = PrefillNode | DecodeNode


class Post:
    """A prefill or decode node, known to the coordinator under a name of its own while it lasts."""

    def __init__(self, kind: str, pool: str, place: Place, coordinator: Any, on_role: Callable[[str], None]):
        """`on_role` is told when the coordinator wants another kind of node in this process."""
        self.kind = kind
        self.pool = pool
        self.name = member_name(kind)
        self.state = STARTING
        self.loaded_share = 0.0
        self.node: Node | None = None
        self._place = place
        self._on_role = on_role
        timeout_s = place.config.experts.dispatch_timeout_s
        dispatch = DispatchConfig(self.name, place.secret, timeout_s, host=host_and_pid()["host"])
        self.experts = RemoteExperts(dispatch)
        self._heartbeat = Heartbeat(coordinator, self.describe, self._follow)
        self._heartbeat.start()
        endpoint = place.config.operations.traces_endpoint
        self._tracing = start_tracing(endpoint, kind, self.name, self.experts.spans)

    def open(self, transformer: Transformer) -> None:
        """Begin to serve; the weights may be another post's too."""
        make = make_prefill if self.kind == "prefill" else make_decode
        stays = transformer.device.type == "cpu" or self._place.config.transport.tensors != "host"
        routed = self.experts if stays else StagedExperts(self.experts)
        node = make(self.name, self._place, transformer.plugged_into(routed))
        node.experts_epoch = lambda: self.experts.epoch
        node.dispatch_report = self.experts.report
        node.trace_dispatches = self.experts.trace
        node.spans = self.experts.spans
        node.start()
        gc.collect()  # what is garbage now, such as an old node that somebody still looked at, would stay
        gc.freeze()
        self.node, self.loaded_share, self.state = node, 1.0, READY

    def describe(self) -> Member:
        """This node, for the coordinator."""
        node = self.node if self.state != STARTING else None
        return Member(
            self.name,
            self.kind,
            node.endpoint.address if node else "",
            self.state,
            loaded_share=self.loaded_share,
            report=node.report() if node else None,
            pool=self.pool,
            **host_and_pid(),
        )

    @property
    def has_died(self) -> bool:
        """Whether its node has stopped computing, though nobody asked it to."""
        return self.node is not None and self.state == READY and not self.node.is_alive

    async def close(self, drain_s: float = DRAIN_S) -> None:
        """Take nothing new, finish what is here as long as that may take, then go; raises StepsFail."""
        self.state = DRAINING if self.node is not None else STARTING
        await self._heartbeat.announce(FAREWELL_S)
        if self.node is not None:
            await asyncio.sleep(NOTICED_S)
            await drained(self.node, drain_s)
        await self._heartbeat.stop()
        try:
            await asyncio.to_thread(self.experts.close)  # first: a step that waits for them ends at once
            if self.node is not None:
                await asyncio.to_thread(self.node.close)
                self.node = None
        finally:
            await stop_tracing(self._tracing)

    async def _follow(self, view: View) -> None:
        """Go by a newer placement, and hear which role is wanted here."""
        before_epoch = self.experts.epoch
        if view.placement_in_force is not None:
            self.experts.adopt(view.placement_in_force)
        role = view.roles.get(self.name, self.kind)
        if role != self.kind and self.state == READY:
            self._on_role(role)
        if self.state != STARTING and self.experts.epoch > before_epoch:  # shards wait for every node's word
            await self._heartbeat.announce()


def make_prefill(name: str, place: Place, transformer: Transformer) -> PrefillNode:
    """A prefill node as configured."""
    section = place.config.prefill
    config = PrefillConfig(
        name,
        place.address(name),
        place.secret,
        section.latents_bytes,
        section.step_tokens_max,
        section.requests_max,
        section.micro_batches,
        packs_latents=place.config.model.latents == "fp8",
        step_s_max=step_s_max(place),
    )
    return PrefillNode(config, transformer)


def make_decode(name: str, place: Place, transformer: Transformer) -> DecodeNode:
    """A decode node as configured."""
    section = place.config.decode
    config = DecodeConfig(
        name,
        place.address(name),
        place.secret,
        section.latents_bytes,
        section.requests_max,
        micro_batches(section, transformer),
        place.config.transport.lease_s,
        place.tensors_address(name),
        packs_latents=place.config.model.latents == "fp8",
        step_s_max=step_s_max(place),
    )
    return DecodeNode(config, transformer)


def micro_batches(section: DecodeSection, transformer: Transformer) -> int:
    """As configured, else two where something is idle while tokens are with the experts."""
    travels = transformer.device.type != "cpu" and bool(transformer.config.moe_layers)
    return section.micro_batches or (2 if travels else 1)


def step_s_max(place: Place) -> float:
    """Seconds after which a step is taken for one without end, and its node for one to be replaced."""
    return max(STEP_S_MIN, STEP_TIMEOUTS * place.config.experts.dispatch_timeout_s)


async def drained(node: Node, drain_s: float) -> None:
    """Wait until a node has no requests, at most so long."""
    end_s = time.monotonic() + drain_s
    while node.is_alive and time.monotonic() < end_s:
        if node.report().requests_count == 0:
            return
        await asyncio.sleep(DRAIN_POLL_S)
