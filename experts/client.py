"""RoutedExperts over channels: one dispatch frame for each shard and layer, answers combined here.

A dispatch changes nothing on a shard, so one that was refused or lost with its channel is simply sent again,
by the newest placement, until the time allowed is over: at once where other shards hold all that it needs.
"""

import contextlib
import itertools
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from experts.config import DispatchConfig
from experts.errors import DispatchRefused, ExpertsUnavailable
from experts.messages import (
    COMBINE,
    DISPATCH,
    DISPATCH_BOUNDS_S,
    REFUSED,
    DispatchHeader,
    DispatchReport,
    Placement,
)
from experts.route import Route, ShardSlots
from kernels.model.host_copies import brought
from kernels.ops.mix import mix
from kernels.transport.connect import connect
from kernels.transport.errors import ChannelError, ChannelTimeout, FrameMalformed
from kernels.transport.frame import Buffers, Frame, FrameLimits, Header
from kernels.transport.spans import UNTRACED, SpanLog, place_under
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import as_bytes

RETRY_S = 0.05
DOWN_S = 4.0  # a shard that failed is passed over so long, and twice as long each time it fails again
DOWN_MAX_S = 60.0
BEHIND_S = 0.5  # one that refused is passed over so long: most likely it, or this node, is a placement behind
SHARDS_MAX = 1 << 16
CONNECT_TIMEOUT_S = 2.0
JOIN_S = 10.0  # in which GPUs that are joined are not silent; a join that hangs must not cost the whole call
ANSWER_BYTES_MAX = FrameLimits().payload_bytes_max


@dataclass(slots=True, weakref_slot=True, eq=False)
class Part:
    """What one shard has of a call: where its answer goes, and whether it is here."""

    address: str
    channel: StreamChannel
    share: ShardSlots
    tokens: torch.Tensor
    """Those that the shard needs, ascending int64, beside the hidden states."""
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
    begin_s: float
    end_s: float
    traced: str = UNTRACED
    """Place that it is done under, in the trace of a request; `place` is its own."""
    place: str = UNTRACED
    order: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    parts: list[Part] = field(default_factory=list)
    silences_count: int = 0
    """Shards given up for their silence: the next may be silent twice as long, it may have much to do."""

    def combine(self) -> torch.Tensor:
        """Wait for all shards and mix, `[tokens, hidden]` float32; raises ExpertsUnavailable."""
        self.experts.finish(self)
        return mix(self.outputs, self.expert_weights, self.order)


@dataclass(slots=True)
class Pieces:
    """One layer's tokens where all slots on one shard would be too many for its answer."""

    experts: "RemoteExperts"
    layer: int
    first: Call
    rest: list[tuple[torch.Tensor, ...]]
    """Hidden states, expert ids and weights of each further piece."""

    def combine(self) -> torch.Tensor:
        """Piece after piece, while the next is on its way; raises ExpertsUnavailable."""
        call, mixed = self.first, []
        for piece in self.rest:
            following = self.experts.dispatch(self.layer, *piece)
            mixed.append(call.combine())
            call = following
        return torch.cat([*mixed, call.combine()])


class RemoteExperts:
    """The plug of a node into its shard group; one thread dispatches, any one may bring a new placement."""

    is_recordable = False

    def __init__(self, config: DispatchConfig):
        self.config = config
        self._route: Route | None = None
        self._placed = threading.Condition()
        self._channels: dict[str, StreamChannel] = {}
        self._down_until_s: dict[str, float] = {}
        self._failures_counts: dict[str, int] = {}
        self._parts: weakref.WeakValueDictionary[int, Part] = weakref.WeakValueDictionary()  # of living calls
        self._call_ids: Iterator[int] = itertools.count(1)
        self.retries_count = 0
        self._counts = [0] * (len(DISPATCH_BOUNDS_S) + 1)
        self._took_s = 0.0
        self._waited_s = 0.0
        self._given_up_count = 0
        self.spans = SpanLog()
        self._traced = UNTRACED
        self._is_closed = False

    def adopt(self, placement: Placement) -> None:
        """Go by a newer placement from the next dispatch on."""
        with self._placed:
            if self._route is None or placement.epoch > self._route.epoch:
                self._route = Route(placement, self.config.host)
                self._placed.notify_all()

    def trace(self, traceparent: str) -> None:
        """Say under which place in a trace the dispatches from now on are; none where it is empty."""
        self._traced = traceparent

    @property
    def epoch(self) -> int:
        """Epoch of the placement in force; 0 before the first."""
        return self._route.epoch if self._route else 0

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Call | Pieces:
        """Send each shard its tokens of `hidden [tokens, hidden]`; does not wait for the answers."""
        slots_max = ANSWER_BYTES_MAX // (hidden.shape[1] * hidden.element_size())
        tokens_max = max(slots_max // expert_ids.shape[1], 1)
        if len(hidden) > tokens_max:
            parts = (part.split(tokens_max) for part in (hidden, expert_ids, expert_weights))
            first, *rest = zip(*parts, strict=True)
            return Pieces(self, layer, self.dispatch(layer, *first), rest)
        now_s = time.monotonic()
        end_s = now_s + self.config.timeout_s
        trace = (self._traced, place_under(self._traced))
        call = Call(self, layer, hidden, expert_ids, expert_weights, now_s, end_s, *trace)
        try:
            self._send(call)
        except ChannelError:
            call.parts = []  # sent anew when it is waited for
        return call

    def finish(self, call: Call) -> None:
        """Wait until every part of a call is here, sending it anew where a shard failed."""
        begin_s = time.monotonic()
        self._finish(call)
        now_s = time.monotonic()
        self._waited_s += now_s - begin_s
        self._took_s += now_s - call.begin_s
        self._counts[bisect_left(DISPATCH_BOUNDS_S, now_s - call.begin_s)] += 1
        if call.traced:
            numbers = {"trivium.layer": call.layer, "trivium.tokens_count": len(call.hidden)}
            self.spans.record("dispatch", call.traced, call.begin_s, now_s, call.place, **numbers)

    def report(self) -> DispatchReport:
        """Numbers about the dispatches until now; safe from any thread."""
        counts = tuple(self._counts)
        return DispatchReport(counts, self._took_s, self._waited_s, self.retries_count, self._given_up_count)

    def _finish(self, call: Call) -> None:
        while True:
            try:
                if not call.parts:
                    self._send(call)
                for part in call.parts:
                    self._receive(part, call)
                return
            except (ChannelError, DispatchRefused) as error:
                self.retries_count += 1
                if time.monotonic() + RETRY_S > call.end_s:
                    self._given_up_count += 1
                    raise ExpertsUnavailable(
                        f"layer {call.layer}: no answer within {self.config.timeout_s} s: {error}"
                    ) from error
                if not self._others_hold(call):
                    time.sleep(RETRY_S)
            finally:
                call.parts = []

    def close(self) -> None:
        """Close the channels to all shards, and open no more; from any thread."""
        self._is_closed = True
        channels = list(self._channels.values())  # another thread may dispatch
        for channel in channels:
            channel.end()
        for channel in channels:  # each may wait for GPUs, which all let go meanwhile
            channel.close()

    def _current_route(self, end_s: float) -> Route:
        if self._route is None:
            with self._placed:
                if not self._placed.wait_for(lambda: self._route is not None, end_s - time.monotonic()):
                    self._given_up_count += 1
                    raise ExpertsUnavailable("no placement of experts is known yet")
        return self._route

    def _send(self, call: Call) -> None:
        route = self._current_route(call.end_s)
        self._leave_old_shards(route)
        call_id = next(self._call_ids)
        call.order, shares = route.split(call.layer, call.expert_ids, call_id, self._down())
        call.outputs = call.hidden.new_empty(len(call.order), call.hidden.shape[1])
        call.order, tokens = indices_beside(call.hidden, call.order, shares)
        # all channels first: nobody computes in vain for a call of which one shard cannot be reached
        call.parts = [
            self._part(route.addresses[share.shard], share, some, call)
            for share, some in zip(shares, tokens, strict=True)
        ]
        for part in call.parts:
            self._send_part(part, call, route, call_id * SHARDS_MAX + part.share.shard)
        for part in call.parts:
            while part.channel.has_pending and not part.channel.carries_tensors:  # those go by themselves
                with self._patience(part, call) as patience_s:
                    part.channel.flush(patience_s)

    def _part(self, address: str, share: ShardSlots, tokens: torch.Tensor, call: Call) -> Part:
        channel = self._channels.get(address)
        if channel is None and not self._is_closed:
            timeout_s = min(CONNECT_TIMEOUT_S, max(call.end_s - time.monotonic(), RETRY_S))
            try:
                channel = connect(address, self.config.secret, self.config.name, timeout_s)
            except ChannelError:
                self._pass_over(address)
                raise
            self._channels[address] = channel
        if self._is_closed:
            if channel is not None:
                channel.close()
            raise ExpertsUnavailable("this node is closing, and dispatches no more")
        return Part(address, channel, share, tokens, call.outputs[share.slots])

    def _send_part(self, part: Part, call: Call, route: Route, part_id: int) -> None:
        """Send what a shard needs, under a number by which its answer finds the part while its call lives."""
        self._parts[part_id] = part
        share = part.share
        hidden = only_needed(call.hidden, part.tokens)
        slots = (share.experts, share.counts)
        header = DispatchHeader(part_id, route.epoch, call.layer, len(hidden), *slots, call.place)
        try:
            tokens = hidden if part.channel.carries_tensors else as_bytes(hidden)
            part.channel.send(DISPATCH, header.body(), [tokens, memoryview(share.rows).cast("B")])
        except ChannelError:
            self._drop(part)
            raise

    def _receive(self, part: Part, call: Call) -> None:
        while not part.done:
            if part.refusal is not None:
                self._leave_out(part.address, BEHIND_S)
                raise DispatchRefused(part.refusal)
            with self._patience(part, call) as patience_s:
                self._accept(part.channel.receive(patience_s, self._choose_buffers))

    @contextlib.contextmanager
    def _patience(self, part: Part, call: Call) -> Iterator[float]:
        """Seconds to wait for a shard; ends quietly, to wait again, while nobody else could answer.

        So it does where GPUs are joined meanwhile, for JOIN_S: a shard is silent only from then on.
        """
        begin_s = time.monotonic()
        left_s = max(call.end_s - begin_s, 0)
        try:
            yield min(self.config.silence_s * 2**call.silences_count, left_s)
        except ChannelTimeout:
            down, now_s = {part.address, *self._down()}, time.monotonic()
            if now_s < call.end_s:
                joins = part.channel.joined_s > begin_s and now_s < part.channel.began_s + JOIN_S
                if joins or not self._route.has_others(call.layer, part.share.experts, down):
                    return
                call.silences_count += 1
            self._drop(part)
            raise
        except ChannelError:
            self._drop(part)
            raise

    def _drop(self, part: Part) -> None:
        """Close a channel that failed; other calls on it then find it closed and are sent anew too."""
        self._pass_over(part.address)
        part.channel.close()
        if self._channels.get(part.address) is part.channel:
            del self._channels[part.address]

    def _pass_over(self, address: str) -> None:
        """Ask a shard that failed only for what nobody else holds, for longer each time it fails again."""
        failures_count = self._failures_counts.get(address, 0)
        self._failures_counts[address] = failures_count + 1
        self._leave_out(address, min(DOWN_S * 2 ** min(failures_count, 8), DOWN_MAX_S))

    def _leave_out(self, address: str, down_s: float) -> None:
        until_s = time.monotonic() + down_s
        self._down_until_s[address] = max(self._down_until_s.get(address, until_s), until_s)

    def _down(self) -> set[str]:
        """Shards that failed or refused a moment ago."""
        if not self._down_until_s:
            return set()
        now_s = time.monotonic()
        self._down_until_s = {shard: end_s for shard, end_s in self._down_until_s.items() if end_s > now_s}
        return set(self._down_until_s)

    def _others_hold(self, call: Call) -> bool:
        """Whether a call can do without the shards that failed a moment ago."""
        route = self._route
        return route is not None and route.has_others(
            call.layer, call.expert_ids.unique().tolist(), self._down()
        )

    def _choose_buffers(self, header: Header) -> Buffers | None:
        part = self._part_of(header.body)
        if part is None:
            return None  # an answer to a call that was given up
        buffers = []
        if header.kind == COMBINE:
            buffers = [part.outputs if any(header.on_device) else as_bytes(part.outputs)]
        size_bytes = sum(buffer.nbytes for buffer in buffers)
        if header.kind not in (COMBINE, REFUSED) or header.payload_bytes != size_bytes:
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
            self._failures_counts.pop(part.address, None)

    def _part_of(self, body: Any) -> Part | None:
        match body:
            case [int() as call_id, *_]:
                return self._parts.get(call_id)
        raise FrameMalformed("an answer does not say to which dispatch")

    def _leave_old_shards(self, route: Route) -> None:
        """Close channels to shards that the placement no longer names, once no call waits there."""
        for address in self._failures_counts.keys() - route.addresses:
            del self._failures_counts[address]
        old = self._channels.keys() - route.addresses
        waiting = {part.address for part in self._parts.values() if not part.done} if old else set()
        for address in old - waiting:
            self._channels.pop(address).close()


def indices_beside(
    hidden: torch.Tensor, order: torch.Tensor, shares: Sequence[ShardSlots]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A dispatch's order and each share's tokens where the hidden states are, in one copy not awaited."""
    parts = [order, *(torch.from_numpy(share.tokens) for share in shares)]
    if hidden.device.type != "cpu":
        parts = brought(parts, hidden.device).split([len(part) for part in parts])
    return parts[0], list(parts[1:])


def only_needed(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The `tokens` of `hidden [tokens, hidden]`, contiguous; not copied where that is all of them."""
    if len(tokens) == len(hidden):
        return hidden.contiguous()
    return hidden[tokens]
