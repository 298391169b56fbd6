"""RoutedExperts over channels: one dispatch frame for each shard and layer, answers combined here.

A dispatch changes nothing on a shard, so one that was refused or lost with its channel is simply sent again,
by the newest placement, until the time allowed is over.
"""

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from experts.config import DispatchConfig
from experts.errors import DispatchRefused, ExpertsUnavailable
from experts.messages import COMBINE, DISPATCH, REFUSED, DispatchHeader, Placement
from kernels.ops.mix import mix
from kernels.ops.sort_by_expert import sort_by_expert
from kernels.transport.connect import connect
from kernels.transport.errors import ChannelError, FrameMalformed
from kernels.transport.frame import Frame, Header
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import as_bytes

RETRY_S = 0.05
CONNECT_TIMEOUT_S = 2.0


class Route:
    """A placement in the form that dispatch needs: experts ordered by shard, so that one sort serves both."""

    def __init__(self, placement: Placement):
        self.epoch = placement.epoch
        self._first_layer = placement.first_layer
        self.addresses = [shard.address for shard in placement.shards]
        self._ranks: list[torch.Tensor] = []
        self._experts: list[list[int]] = []
        self._homes: list[tuple[int, ...]] = []
        for homes in placement.homes:
            by_shard = sorted(range(len(homes)), key=lambda expert, homes=homes: (homes[expert], expert))
            ranks = torch.empty(len(homes), dtype=torch.int64)
            ranks[torch.tensor(by_shard)] = torch.arange(len(homes))
            self._ranks.append(ranks)
            self._experts.append(by_shard)
            self._homes.append(homes)

    def split(
        self, layer: int, expert_ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[int, tuple[int, ...], tuple[int, ...]]]]:
        """Order of the slots by shard and expert, and for each shard its index, experts and slot counts."""
        index = layer - self._first_layer
        order, ranks, counts = sort_by_expert(self._ranks[index][expert_ids])
        pairs = [(self._experts[index][rank], count) for rank, count in zip(ranks, counts, strict=True)]
        by_shard = itertools.groupby(pairs, key=lambda pair: self._homes[index][pair[0]])
        return order, [(shard, *zip(*group, strict=True)) for shard, group in by_shard]


@dataclass(slots=True, weakref_slot=True, eq=False)
class Part:
    """What one shard has of a call: where its answer goes, and whether it is here."""

    address: str
    channel: StreamChannel
    outputs: torch.Tensor
    done: bool = False
    refusal: str | None = None


@dataclass(slots=True)
class Call:
    """One layer's tokens on their way through the shards."""

    experts: "RemoteExperts"
    layer: int
    hidden: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor
    end_s: float
    order: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    parts: list[Part] = field(default_factory=list)

    def combine(self) -> torch.Tensor:
        """Wait for all shards and mix, `[tokens, hidden]` float32; raises ExpertsUnavailable."""
        self.experts.finish(self)
        return mix(self.outputs, self.expert_weights, self.order)


class RemoteExperts:
    """The plug of a node into its shard group; one thread dispatches, any one may bring a new placement."""

    def __init__(self, config: DispatchConfig):
        self.config = config
        self._route: Route | None = None
        self._placed = threading.Condition()
        self._channels: dict[str, StreamChannel] = {}
        self._parts: weakref.WeakValueDictionary[int, Part] = weakref.WeakValueDictionary()  # of living calls
        self._call_ids: Iterator[int] = itertools.count(1)
        self.retries_count = 0

    def adopt(self, placement: Placement) -> None:
        """Go by a newer placement from the next dispatch on."""
        with self._placed:
            if self._route is None or placement.epoch > self._route.epoch:
                self._route = Route(placement)
                self._placed.notify_all()

    @property
    def epoch(self) -> int:
        """Epoch of the placement in force; 0 before the first."""
        return self._route.epoch if self._route else 0

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Call:
        """Send each shard its tokens of `hidden [tokens, hidden]`; does not wait for the answers."""
        call = Call(self, layer, hidden, expert_ids, expert_weights, time.monotonic() + self.config.timeout_s)
        try:
            self._send(call)
        except ChannelError:
            call.parts = []  # sent anew when it is waited for
        return call

    def finish(self, call: Call) -> None:
        """Wait until every part of a call is here, sending it anew where a shard failed."""
        while True:
            try:
                if not call.parts:
                    self._send(call)
                for part in call.parts:
                    self._receive(part, call.end_s)
                return
            except (ChannelError, DispatchRefused) as error:
                self.retries_count += 1
                if time.monotonic() + RETRY_S > call.end_s:
                    raise ExpertsUnavailable(
                        f"layer {call.layer}: no answer within {self.config.timeout_s} s: {error}"
                    ) from error
                time.sleep(RETRY_S)
            finally:
                call.parts = []

    def close(self) -> None:
        """Close the channels to all shards."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _current_route(self, end_s: float) -> Route:
        with self._placed:
            if not self._placed.wait_for(lambda: self._route is not None, max(end_s - time.monotonic(), 0)):
                raise ExpertsUnavailable("no placement of experts is known yet")
            return self._route

    def _send(self, call: Call) -> None:
        route = self._current_route(call.end_s)
        self._leave_old_shards(route)
        call.order, by_shard = route.split(call.layer, call.expert_ids)
        call.outputs = call.hidden.new_empty(len(call.order), call.hidden.shape[1])
        rows = (call.order // call.expert_ids.shape[1]).to(torch.int32)
        ends = itertools.accumulate(sum(counts) for _, _, counts in by_shard)
        slots = [slice(begin, end) for begin, end in itertools.pairwise((0, *ends))]
        # all channels first: nobody computes in vain for a call of which one shard cannot be reached
        call.parts = [
            self._part(route.addresses[shard], call.outputs[some], call.end_s)
            for (shard, _, _), some in zip(by_shard, slots, strict=True)
        ]
        for part, (_, experts, counts), some in zip(call.parts, by_shard, slots, strict=True):
            hidden, part_rows = only_needed(call.hidden, rows[some])
            header = DispatchHeader(self._number(part), route.epoch, call.layer, len(hidden), experts, counts)
            with self._dropped_on_error(part):
                part.channel.send(DISPATCH, header.body(), [as_bytes(hidden), as_bytes(part_rows)])
        for part in call.parts:
            if part.channel.has_pending:
                with self._dropped_on_error(part):
                    part.channel.flush(max(call.end_s - time.monotonic(), 0))

    def _part(self, address: str, outputs: torch.Tensor, end_s: float) -> Part:
        channel = self._channels.get(address)
        if channel is None:
            timeout_s = min(CONNECT_TIMEOUT_S, max(end_s - time.monotonic(), RETRY_S))
            channel = connect(address, self.config.secret, self.config.name, timeout_s)
            self._channels[address] = channel
        return Part(address, channel, outputs)

    def _number(self, part: Part) -> int:
        """A new number, by which the answer will find the part for as long as its call lives."""
        call_id = next(self._call_ids)
        self._parts[call_id] = part
        return call_id

    def _receive(self, part: Part, end_s: float) -> None:
        with self._dropped_on_error(part):
            while not part.done:
                if part.refusal is not None:
                    raise DispatchRefused(part.refusal)
                self._accept(part.channel.receive(max(end_s - time.monotonic(), 0), self._choose_buffers))

    @contextlib.contextmanager
    def _dropped_on_error(self, part: Part) -> Iterator[None]:
        """Close a channel that failed; other calls on it then find it closed and are sent anew too."""
        try:
            yield
        except ChannelError:
            part.channel.close()
            if self._channels.get(part.address) is part.channel:
                del self._channels[part.address]
            raise

    def _choose_buffers(self, header: Header) -> list[memoryview] | None:
        part = self._part_of(header.body)
        if part is None:
            return None  # an answer to a call that was given up
        buffers = [as_bytes(part.outputs)] if header.kind == COMBINE else []
        if header.kind not in (COMBINE, REFUSED) or header.payload_bytes != sum(map(len, buffers)):
            raise FrameMalformed(f"{header.kind!r:.40} of {header.payload_bytes} bytes answers no dispatch")
        return buffers

    def _accept(self, frame: Frame) -> None:
        """Note what has come, for whichever call on this channel it is."""
        part = self._part_of(frame.body)
        if part is None:
            return
        if frame.kind == REFUSED:
            part.refusal = str(frame.body[-1])
        else:
            part.done = True

    def _part_of(self, body: Any) -> Part | None:
        match body:
            case [int() as call_id, *_]:
                return self._parts.get(call_id)
        raise FrameMalformed("an answer does not say to which dispatch")

    def _leave_old_shards(self, route: Route) -> None:
        """Close channels to shards that the placement no longer names, once no call waits there."""
        if len(self._channels) <= len(route.addresses):
            return
        waiting = {part.address for part in self._parts.values() if not part.done}
        for address in self._channels.keys() - waiting - set(route.addresses):
            self._channels.pop(address).close()


def only_needed(hidden: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of `hidden` that `rows [slots]` name, and the rows among those; all where most are named."""
    if len(rows) >= len(hidden):
        return hidden.contiguous(), rows
    needed, renamed = torch.unique(rows, return_inverse=True)
    return hidden[needed], renamed.to(torch.int32)
