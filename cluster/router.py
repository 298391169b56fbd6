"""Takes each request to a prefill and a decode node, and on to others when one is lost: a pure state machine.

    waiting ──reserve──▶ reserving ──prefill──▶ prefilling ──first token──▶ decoding ──▶ finished
       ▲                     │ no room              │ node lost                 │ node lost
       └─────────────────────┴──────────────────────┴── tokens so far as prompt ┘

Events come in by `handle`, commands come out; time is an argument. A later attempt at a request has a higher
generation, and whatever an earlier one still says is not heard.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from cluster.events import (
    Command,
    DeliverTokens,
    Event,
    FailRequest,
    FinishRequest,
    NodeDrained,
    NodeJoined,
    NodeLost,
    NodeSaid,
    Phases,
    RequestAdmitted,
    RequestCancelled,
    RoutedRequest,
    SayToNode,
    TimePassed,
)
from cluster.node_choice import NodeView, choose_decode, choose_prefill
from decode.messages import (
    CancelRequest,
    ExtendLeases,
    NodeReport,
    PageReservation,
    RequestFailed,
    ReservationRefused,
    ReservePages,
    TokenChunk,
    TokenChunks,
    TokenLogprob,
)
from kernels.model.pages import page_hashes, pages_for
from prefill.messages import FirstTokenChunk, HandedOver, PrefillPrompt


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RESERVING = "reserving"
    PREFILLING = "prefilling"
    DECODING = "decoding"


@dataclass
class Route:
    """A request under way: which attempt this is, on which nodes, and what has come of it."""

    request: RoutedRequest
    admitted_s: float
    hashes: list[bytes]
    phase: Phase = Phase.WAITING
    generation: int = 0
    attempts_count: int = 0
    prefill: str = ""
    decode: str = ""
    outputs: list[int] = field(default_factory=list)
    early: dict[int, TokenChunk] = field(default_factory=dict)
    """Chunks of this attempt that overtook an earlier one."""
    cached_tokens_count: int = 0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    first_token_s: float = 0.0
    is_handed_over: bool = False
    """Whether the decode node has all it needs, so that the prefill node may go."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt of the next attempt: the client's, and what was generated."""
        return (*self.request.token_ids, *self.outputs)

    @property
    def pages_wanted_count(self) -> int:
        """Pages for the prompt and all outputs."""
        return pages_for(len(self.request.token_ids) + self.request.sampling.tokens_max)


class Router:
    """All requests of one gateway, and the nodes it knows."""

    def __init__(self, lease_s: float, attempts_max: int = 8):
        self.nodes: dict[str, NodeView] = {}
        self.routes: dict[str, Route] = {}
        self.attempts_max = attempts_max
        self._lease_s = lease_s
        self._extended_s = float("-inf")
        self._waiting: OrderedDict[str, None] = OrderedDict()

    @property
    def requests_waiting_count(self) -> int:
        """Requests that no node has taken yet."""
        return len(self._waiting)

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """What to do about an event."""
        return list(self._handle(event, now_s))

    def _handle(self, event: Event, now_s: float) -> Iterator[Command]:
        match event:
            case RequestAdmitted(request):
                self.routes[request.request_id] = Route(request, now_s, page_hashes(request.token_ids))
                self._waiting[request.request_id] = None
                yield from self._place()
            case RequestCancelled(request_id):
                yield from self._end(request_id)
            case NodeJoined(name, kind, address):
                self.nodes[name] = NodeView(name, kind, address)
            case NodeDrained(name):
                if name in self.nodes:
                    self.nodes[name].is_draining = True
            case NodeLost(name):
                yield from self._node_lost(name)
            case NodeSaid(name, message):
                yield from self._heard(name, message, now_s)
            case TimePassed():
                yield from self._place()
                yield from self._extend_leases(now_s)

    # placing

    def _place(self) -> Iterator[Command]:
        """Give waiting requests to nodes, higher priority first, then the older; stop at the first without room."""
        by_priority = sorted(self._waiting, key=lambda request_id: -self.routes[request_id].request.priority)
        for request_id in by_priority:
            route = self.routes[request_id]
            prefill = choose_prefill(self.nodes.values(), route.hashes)
            decode = choose_decode(self.nodes.values(), route.pages_wanted_count)
            if prefill is None or decode is None:
                return
            del self._waiting[request_id]
            yield self._reserve(route, prefill, decode)

    def _reserve(self, route: Route, prefill: NodeView, decode: NodeView) -> Command:
        route.phase = Phase.RESERVING
        route.generation += 1
        route.prefill, route.decode = prefill.name, decode.name
        route.early = {}
        route.is_handed_over = False
        decode.requests_count += 1
        decode.pages_available_count -= route.pages_wanted_count
        prefill.requests_count += 1
        prefill.tokens_sent_count += len(route.token_ids)
        prefill.remember_prefix(route.hashes)
        request = route.request
        return SayToNode(
            decode.name,
            ReservePages(
                request.request_id, route.generation, route.token_ids, len(request.token_ids), request.sampling
            ),
        )

    def _leave_prefill(self, route: Route) -> None:
        node = self.nodes.get(route.prefill)
        if node is not None and route.phase in (Phase.RESERVING, Phase.PREFILLING):
            node.requests_count -= 1
            node.tokens_sent_count -= len(route.token_ids)

    def _leave_decode(self, route: Route) -> None:
        node = self.nodes.get(route.decode)
        if node is not None:
            node.requests_count -= 1
            node.pages_available_count = (node.pages_available_count or 0) + route.pages_wanted_count

    # what nodes say

    def _heard(self, name: str, message: object, now_s: float) -> Iterator[Command]:
        match message:
            case NodeReport():
                self._take_report(name, message)
                yield from self._place()
            case TokenChunks(chunks):
                for chunk in chunks:
                    if (route := self._current(chunk.request_id, chunk.generation)) is not None:
                        route.is_handed_over = True
                        yield from self._tokens(route, chunk, now_s, ended_itself=True)
            case FirstTokenChunk():
                yield from self._first_token(message, now_s)
            case PageReservation():
                yield from self._reserved(message)
            case ReservationRefused():
                yield from self._refused(message)
            case HandedOver(request_id, generation, transfer_s):
                if (route := self._current(request_id, generation)) is not None:
                    route.is_handed_over = True
                    route.transfer_s += transfer_s
            case RequestFailed():
                yield from self._failed(message)

    def _current(self, request_id: str, generation: int) -> Route | None:
        route = self.routes.get(request_id)
        return route if route is not None and route.generation == generation else None

    def _take_report(self, name: str, report: NodeReport) -> None:
        node = self.nodes.get(name)
        if node is not None:
            node.report = report
            node.pages_available_count = report.pages_free_count + report.pages_cached_count

    def _reserved(self, reservation: PageReservation) -> Iterator[Command]:
        route = self._current(reservation.request_id, reservation.generation)
        if route is None or route.phase is not Phase.RESERVING:
            return
        route.phase = Phase.PREFILLING
        request = route.request
        yield SayToNode(
            route.prefill,
            PrefillPrompt(
                request.request_id,
                route.generation,
                route.token_ids,
                len(request.token_ids),
                request.sampling,
                reservation.address,
                request.priority,
            ),
        )

    def _refused(self, refused: ReservationRefused) -> Iterator[Command]:
        route = self._current(refused.request_id, refused.generation)
        if route is None or route.phase is not Phase.RESERVING:
            return
        self._leave_prefill(route)
        self._leave_decode(route)
        node = self.nodes.get(route.decode)
        if node is not None:
            node.pages_available_count = refused.pages_available_count
        self._wait_again(route)
        yield from self._place()

    def _first_token(self, first: FirstTokenChunk, now_s: float) -> Iterator[Command]:
        route = self._current(first.chunk.request_id, first.chunk.generation)
        if route is None or route.phase is not Phase.PREFILLING:
            return
        self._leave_prefill(route)
        route.phase = Phase.DECODING
        route.prefill_s += first.prefill_s
        if not route.outputs:
            route.cached_tokens_count = first.cached_tokens_count
        route.first_token_s = route.first_token_s or now_s
        yield from self._tokens(route, first.chunk, now_s, ended_itself=False)

    def _tokens(self, route: Route, chunk: TokenChunk, now_s: float, ended_itself: bool) -> Iterator[Command]:
        """Deliver what is next in order; `ended_itself` if the decode node frees the request when it finishes."""
        route.early[chunk.index] = chunk
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        finish_reason = None
        while (following := route.early.pop(len(route.outputs), None)) is not None:
            route.outputs.extend(following.token_ids)
            tokens.extend(following.token_ids)
            logprobs.extend(following.logprobs)
            finish_reason = following.finish_reason
        if tokens:
            yield DeliverTokens(chunk.request_id, tuple(tokens), tuple(logprobs))
        if finish_reason is not None:
            phases = self.phases(route, now_s)
            yield FinishRequest(chunk.request_id, finish_reason, route.cached_tokens_count, phases)
            yield from self._end(chunk.request_id, tell_nodes=not ended_itself)

    def phases(self, route: Route, now_s: float) -> Phases:
        """Where a request's seconds went until now; what neither computed nor travelled was queued."""
        first_s = route.first_token_s or now_s
        queued_s = max(first_s - route.admitted_s - route.prefill_s, 0.0)
        return Phases(queued_s, route.prefill_s, route.transfer_s, now_s - first_s, now_s - route.admitted_s)

    # ends, and new attempts

    def _end(self, request_id: str, tell_nodes: bool = True) -> Iterator[Command]:
        route = self.routes.pop(request_id, None)
        if route is None:
            return
        self._waiting.pop(request_id, None)
        if route.phase is not Phase.WAITING:
            yield from self._withdraw(route, tell_nodes)
        yield from self._place()

    def _withdraw(self, route: Route, tell_nodes: bool = True) -> Iterator[Command]:
        """Take a request off its nodes."""
        self._leave_prefill(route)
        self._leave_decode(route)
        cancel = CancelRequest(route.request.request_id, route.generation)
        names = dict.fromkeys((route.prefill, route.decode)) if tell_nodes else ()
        for name in names:
            if name in self.nodes:
                yield SayToNode(name, cancel)

    def _wait_again(self, route: Route) -> None:
        route.phase = Phase.WAITING
        self._waiting[route.request.request_id] = None
        self._waiting.move_to_end(route.request.request_id, last=False)

    def _failed(self, failed: RequestFailed) -> Iterator[Command]:
        route = self._current(failed.request_id, failed.generation)
        if route is None or route.phase is Phase.WAITING:
            return
        if failed.retryable:
            yield from self._try_again(route, failed.reason, failed.message)
        else:
            yield FailRequest(failed.request_id, failed.reason, failed.message)
            yield from self._end(failed.request_id)

    def _try_again(self, route: Route, reason: str, message: str) -> Iterator[Command]:
        route.attempts_count += 1
        if route.attempts_count >= self.attempts_max:
            yield FailRequest(route.request.request_id, reason, message)
            yield from self._end(route.request.request_id)
            return
        yield from self._withdraw(route)
        route.generation += 1  # so that nothing of this attempt is heard while the next one waits
        self._wait_again(route)
        yield from self._place()

    def _node_lost(self, name: str) -> Iterator[Command]:
        node = self.nodes.pop(name, None)
        if node is None:
            return
        for route in list(self.routes.values()):
            needs_prefill = route.prefill == name and not route.is_handed_over
            if route.phase is not Phase.WAITING and (needs_prefill or route.decode == name):
                yield from self._try_again(route, "node_lost", f"{node.kind} node {name} was lost")

    def _extend_leases(self, now_s: float) -> Iterator[Command]:
        if now_s - self._extended_s < self._lease_s / 3:
            return
        self._extended_s = now_s
        by_node: dict[str, list[str]] = {}
        for request_id, route in self.routes.items():
            if route.phase is not Phase.WAITING:
                by_node.setdefault(route.decode, []).append(request_id)
        for name, request_ids in by_node.items():
            if name in self.nodes:
                yield SayToNode(name, ExtendLeases(tuple(request_ids)))
