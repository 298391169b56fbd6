"""RoutedExperts over channels: one dispatch frame for each shard and layer, answers combined here.

A dispatch changes nothing on a shard, so one that was refused or lost with its channel is simply sent again,
by the newest placement, until the time allowed is over.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from experts.config import DispatchConfig
from experts.errors import DispatchRefused, ExpertsUnavailable
from experts.messages import COMBINE, DISPATCH, REFUSED, DispatchHeader, Placement
from kernels.model.moe import mix
from kernels.ops.sort_by_expert import sort_by_expert
from kernels.transport.connect import connect
from kernels.transport.errors import ChannelError
from kernels.transport.frame import Frame, Header
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import as_bytes

RETRY_S = 0.05
CONNECT_TIMEOUT_S = 2.0


class Route:
    """A placement in the form that dispatch needs: experts ordered by shard, so that one sort serves both."""

    def __init__(self, placement: Placement):
        self.placement = placement
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
    ) -> tuple[torch.Tensor, list[tuple[int, list[int], list[int]]]]:
        """Order of the slots by shard and expert, and for each shard its index, experts and slot counts."""
        index = layer - self.placement.first_layer
        order, ranks, counts = sort_by_expert(self._ranks[index][expert_ids])
        pairs = [(self._experts[index][rank], count) for rank, count in zip(ranks, counts, strict=True)]
        by_shard = itertools.groupby(pairs, key=lambda pair: self._homes[index][pair[0]])
        return order, [(shard, *map(list, zip(*group, strict=True))) for shard, group in by_shard]


@dataclass(slots=True)
class Part:
    """What one shard has of a call: where its answer goes, and whether it is here."""

    address: str
    channel: StreamChannel
    outputs: torch.Tensor
    done: bool = False


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
    parts: dict[int, Part] = field(default_factory=dict)

    def combine(self) -> torch.Tensor:
        """Wait for all shards and mix, `[tokens, hidden]` float32; raises ExpertsUnavailable."""
        self.experts.finish(self)
        by_slot = torch.empty_like(self.outputs)
        by_slot[self.order] = self.outputs
        return mix(by_slot, self.expert_weights)


class RemoteExperts:
    """The plug of a node into its shard group; one thread dispatches, any thread may bring a new placement."""

    def __init__(self, config: DispatchConfig):
        self.config = config
        self._route: Route | None = None
        self._placed = threading.Condition()
        self._channels: dict[str, StreamChannel] = {}
        self._parts: dict[int, Part] = {}
        self._call_ids: Iterator[int] = itertools.count(1)
        self.retries_count = 0

    def adopt(self, placement: Placement) -> None:
        """Go by a newer placement from the next dispatch on."""
        with self._placed:
            if self._route is None or placement.epoch > self._route.placement.epoch:
                self._route = Route(placement)
                self._placed.notify_all()

    @property
    def epoch(self) -> int:
        """Epoch of the placement in force; 0 before the first."""
        return self._route.placement.epoch if self._route else 0

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Call:
        """Send each shard its tokens of `hidden [tokens, hidden]`; does not wait for the answers."""
        call = Call(self, layer, hidden, expert_ids, expert_weights, time.monotonic() + self.config.timeout_s)
        try:
            self._send(call)
        except ChannelError:
            self._forget(call)  # sent anew when it is waited for
        return call

    def finish(self, call: Call) -> None:
        """Wait until every part of a call is here, sending it anew where a shard failed."""
        while True:
            try:
                if not call.parts:
                    self._send(call)
                for part in call.parts.values():
                    self._receive(part, call.end_s)
                return
            except (ChannelError, DispatchRefused) as error:
                self.retries_count += 1
                if time.monotonic() + RETRY_S > call.end_s:
                    raise ExpertsUnavailable(
                        f"no answer from the experts in {self.config.timeout_s} s"
                    ) from error
                time.sleep(RETRY_S)
            finally:
                self._forget(call)

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
        call.order, by_shard = route.split(call.layer, call.expert_ids)
        choices = call.expert_ids.shape[1]
        call.outputs = call.hidden.new_empty(len(call.order), call.hidden.shape[1])
        rows = (call.order // choices).to(torch.int32)
        begin = 0
        for shard, experts, counts in by_shard:
            end = begin + sum(counts)
            address = route.placement.shards[shard].address
            call_id = next(self._call_ids)
            part = Part(address, self._channel(address), call.outputs[begin:end])
            call.parts[call_id] = self._parts[call_id] = part
            hidden, part_rows = only_needed(call.hidden, rows[begin:end], len(by_shard) == 1)
            header = DispatchHeader(
                call_id, route.placement.epoch, call.layer, hidden.shape[0], tuple(experts), tuple(counts)
            )
            with self._dropped_on_error(part):
                part.channel.send(DISPATCH, header.body(), [as_bytes(hidden), as_bytes(part_rows)])
            begin = end
        for part in call.parts.values():
            with self._dropped_on_error(part):
                part.channel.flush(max(call.end_s - time.monotonic(), 0))

    def _receive(self, part: Part, end_s: float) -> None:
        with self._dropped_on_error(part):
            while not part.done:
                frame = part.channel.receive(max(end_s - time.monotonic(), 0), self._choose_buffers)
                self._accept(frame)

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
        if header.kind != COMBINE:
            return [memoryview(bytearray(header.payload_bytes))]
        part = self._parts.get(header.body[0])
        if part is None or header.payload_bytes != part.outputs.nbytes:
            return None  # an answer to a call that was given up
        return [as_bytes(part.outputs)]

    def _accept(self, frame: Frame) -> None:
        part = self._parts.get(frame.body[0])
        if part is None or frame.refused:
            return
        if frame.kind == REFUSED:
            raise DispatchRefused(frame.body[1])
        part.done = True

    def _channel(self, address: str) -> StreamChannel:
        channel = self._channels.get(address)
        if channel is None:
            channel = connect(address, self.config.secret, self.config.name, CONNECT_TIMEOUT_S)
            self._channels[address] = channel
        return channel

    def _forget(self, call: Call) -> None:
        for call_id in call.parts:
            self._parts.pop(call_id, None)
        call.parts = {}


def only_needed(
    hidden: torch.Tensor, rows: torch.Tensor, all_of_them: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that `rows [slots]` name, each once, and the rows among those."""
    if all_of_them:
        return hidden.contiguous(), rows
    needed, renamed = torch.unique(rows, return_inverse=True)
    return hidden[needed], renamed.to(torch.int32)
