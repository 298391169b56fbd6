"""Takes each request to a prefill and a decode node, and on to others when one is lost: a pure state machine.

    waiting ──reserve──▶ reserving ──prefill──▶ prefilling ──first token──▶ decoding ──▶ finished
       ▲                     │ no room              │ node lost                 │ node lost
       └─────────────────────┴──────────────────────┴── tokens so far as prompt ┘

Events come in by `handle`, commands come out; time is an argument. A later attempt at a request has a higher
generation, and whatever an earlier one still says is not heard.
"""

import itertools
from collections.abc import Iterator

from cluster.events import (
    Command,
    DeliverTokens,
    Event,
    FailRequest,
    FinishRequest,
    NodeDrained,
    NodeFellSilent,
    NodeJoined,
    NodeLost,
    NodeSaid,
    RequestAdmitted,
    RequestCancelled,
    RoutedRequest,
    SayToNode,
    TimePassed,
)
from cluster.node_choice import NodeView, choose_awaited, choose_decode, choose_prefill, pages_largest_count
from cluster.route import Phase, Route
from cluster.waiting import WaitingRequests
from decode.messages import (
    AwaitPages,
    CancelRequest,
    ExtendLeases,
    NodeReport,
    PageReservation,
    RequestFailed,
    ReservationRefused,
    TokenChunk,
    TokenChunks,
)
from kernels.model.pages import PAGE_TOKENS, page_hashes, pages_for
from prefill.messages import FirstTokenChunk, HandedOver

REST_S = 0.1  # before another attempt after a failure, and up to twice that; doubled after each further one
REST_SPREAD = 0.618  # the golden section: it parts those that failed together, whose numbers are in a row
LOOKED_PAST_MAX = 8  # requests without room before the router stops looking for one behind them with room


class Router:
    """All requests of one gateway, and the nodes it knows."""

    def __init__(self, lease_s: float, attempts_max: int = 8):
        self.nodes: dict[str, NodeView] = {}
        self.routes: dict[str, Route] = {}
        self.attempts_max = attempts_max
        self.retries_count = 0
        self.migrations_count = 0
        self._lease_s = lease_s
        self._extended_s = float("-inf")
        self._numbers = itertools.count()
        self._waiting = WaitingRequests()
        self._kept: dict[str, str] = {}  # request id: the decode node that is kept free for it
        self._awaited: dict[str, str] = {}  # the same of those whose node knows
        self._may_place = False

    @property
    def requests_waiting_count(self) -> int:
        """Requests that no node has taken yet."""
        return self._waiting.count

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """What to do about an event; raises ValueError for a request that is under way already."""
        commands = list(self._handle(event, now_s))
        if self._may_place:
            commands.extend(self._place())
        commands.extend(self._await_no_more())
        return commands

    def _handle(self, event: Event, now_s: float) -> Iterator[Command]:
        match event:
            case RequestAdmitted(request):
                self._admit(request, now_s)
            case RequestCancelled(request_id):
                yield from self._end(request_id)
            case NodeJoined(name, kind):
                yield from self._node_lost(name, now_s)  # a restart may be seen before the loss
                self.nodes[name] = NodeView(name, kind)
            case NodeDrained(name) if name in self.nodes:
                self.nodes[name].is_draining = True
            case NodeFellSilent(name) if name in self.nodes:
                self.nodes[name].is_silent = True
            case NodeLost(name):
                yield from self._node_lost(name, now_s)
            case NodeSaid(name, message):
                yield from self._heard(name, message, now_s)
            case TimePassed():
                self._wake_rested(now_s)
                yield from self._extend_leases(now_s)

    # waiting and placing

    def _admit(self, request: RoutedRequest, now_s: float) -> None:
        if request.request_id in self.routes:
            raise ValueError(f"request {request.request_id} is under way already: ids must not be used twice")
        route = Route(request, now_s, next(self._numbers), page_hashes(request.token_ids))
        self.routes[request.request_id] = route
        self._wait(route)

    def _wait(self, route: Route) -> None:
        self._waiting.add(route)
        self._may_place = True

    def _wake_rested(self, now_s: float) -> None:
        for request_id in self._waiting.wake(now_s):
            self._wait(self.routes[request_id])

    def _place(self) -> Iterator[Command]:
        """Give waiting requests to nodes in their turn.

        One without room keeps a node free of those behind it: smaller requests may pass a large one, on other
        nodes, but cannot starve it.
        """
        self._may_place = False
        kept_before, self._kept = self._kept, {}
        open_nodes = [node for node in self.nodes.values() if node.kind == "decode" and node.is_ready]
        passed_count = 0
        while open_nodes and passed_count < LOOKED_PAST_MAX:
            if (request_id := self._waiting.at(passed_count)) is None:
                return
            route = self.routes[request_id]
            decode = choose_decode(open_nodes, route.pages_wanted_count, route.avoids)
            prefill = choose_prefill(self.nodes.values(), route.hashes, route.tokens_count, route.avoids)
            if decode is not None and prefill is not None:
                self._waiting.remove(route)
                yield self._reserve(route, prefill, decode)
            elif (misfit := self._misfit(route)) is not None:
                yield FailRequest(request_id, "request_too_large", misfit)
                yield from self._end(request_id)
            else:
                passed_count += 1
                if prefill is not None:  # or room would not help it
                    self._keep_free(route, open_nodes, kept_before)

    def _keep_free(self, route: Route, open_nodes: list[NodeView], kept_before: dict[str, str]) -> None:
        request_id = route.request.request_id
        kept = choose_awaited(open_nodes, route.pages_wanted_count, kept_before.get(request_id, ""))
        if kept is not None:
            self._kept[request_id] = kept.name
            open_nodes.remove(kept)

    def _await_no_more(self) -> Iterator[Command]:
        """Tell nodes for whom they need keep no pages any more; attempts go on, hence generation 0."""
        for request_id, name in list(self._awaited.items()):
            route = self.routes.get(request_id)
            if self._kept.get(request_id) != name and (route is None or not route.asks(name)):
                del self._awaited[request_id]
                if name in self.nodes:
                    yield SayToNode(name, CancelRequest(request_id, 0))

    def _misfit(self, route: Route) -> str | None:
        """Why no node that is known can ever take a request, or None if one can or is not known yet."""
        wanted_counts = {"decode": route.pages_wanted_count, "prefill": pages_for(route.tokens_count)}
        for kind, wanted_count in wanted_counts.items():
            largest_count = pages_largest_count(self.nodes.values(), kind)
            if largest_count is not None and wanted_count > largest_count:
                return (
                    f"it needs {wanted_count} pages of {PAGE_TOKENS} tokens, and the largest {kind} node has "
                    f"{largest_count}: shorten the prompt, lower max_tokens, or give nodes more memory"
                )
        return None

    def _reserve(self, route: Route, prefill: NodeView, decode: NodeView) -> Command:
        route.phase = Phase.RESERVING
        route.generation += 1
        route.prefill, route.decode = prefill.name, decode.name
        route.tokens_sent_count = route.tokens_count
        route.avoids = ()
        route.early = {}
        route.is_handed_over = False
        decode.requests_count += 1
        decode.pages_available_count -= route.pages_wanted_count
        prefill.requests_count += 1
        prefill.tokens_sent_count += route.tokens_sent_count
        prefill.remember_prefix(route.hashes)
        return SayToNode(decode.name, route.reservation())

    def _leave_prefill(self, route: Route) -> None:
        node = self.nodes.get(route.prefill)
        if node is not None and route.phase in (Phase.RESERVING, Phase.PREFILLING):
            node.requests_count -= 1
            node.tokens_sent_count -= route.tokens_sent_count

    def _leave_decode(self, route: Route) -> None:
        node = self.nodes.get(route.decode)
        if node is not None:
            node.requests_count -= 1
            node.pages_available_count += route.pages_wanted_count
            self._may_place = True

    # what nodes say

    def _heard(self, name: str, message: object, now_s: float) -> Iterator[Command]:
        if name in self.nodes and self.nodes[name].is_silent:
            self.nodes[name].is_silent = False
            self._may_place = True
        match message:
            case NodeReport():
                self._take_report(name, message)
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
                self._refused(message)
            case HandedOver(request_id, generation, transfer_s):
                if (route := self._current(request_id, generation)) is not None:
                    route.is_handed_over = True
                    route.transfer_s += transfer_s
            case RequestFailed():
                yield from self._failed(name, message, now_s)

    def _current(self, request_id: str, generation: int) -> Route | None:
        route = self.routes.get(request_id)
        return route if route is not None and route.generation == generation else None

    def _take_report(self, name: str, report: NodeReport) -> None:
        node = self.nodes.get(name)
        if node is None:
            return
        available_count = report.pages_free_count + report.pages_cached_count
        if not node.is_known or available_count > node.pages_available_count:
            self._may_place = True
        node.report = report
        node.pages_available_count = available_count

    def _reserved(self, reservation: PageReservation) -> Iterator[Command]:
        route = self._current(reservation.request_id, reservation.generation)
        if route is None or route.phase is not Phase.RESERVING:
            return
        route.phase = Phase.PREFILLING
        yield SayToNode(route.prefill, route.prompt(reservation.address))

    def _refused(self, refused: ReservationRefused) -> None:
        route = self._current(refused.request_id, refused.generation)
        if route is None or route.phase is not Phase.RESERVING:
            return
        self._leave_prefill(route)
        self._leave_decode(route)
        node = self.nodes.get(route.decode)
        if node is not None:
            node.pages_available_count = refused.pages_available_count
        self._wait(route)

    def _first_token(self, first: FirstTokenChunk, now_s: float) -> Iterator[Command]:
        route = self._current(first.chunk.request_id, first.chunk.generation)
        if route is None or route.phase is not Phase.PREFILLING:
            return
        self._leave_prefill(route)
        route.phase = Phase.DECODING
        if not route.outputs:
            route.cached_tokens_count = first.cached_tokens_count
            route.prefill_s = first.prefill_s
            route.first_token_s = now_s
        yield from self._tokens(route, first.chunk, now_s, ended_itself=False)

    def _tokens(self, route: Route, chunk: TokenChunk, now_s: float, ended_itself: bool) -> Iterator[Command]:
        """Deliver what is next in order; `ended_itself` if the decode node frees a request that finishes."""
        due = route.take(chunk)
        if due.token_ids:
            yield DeliverTokens(chunk.request_id, due.token_ids, due.logprobs)
        if due.finish_reason is not None:
            phases = route.phases(now_s)
            yield FinishRequest(chunk.request_id, due.finish_reason, route.cached_tokens_count, phases)
            yield from self._end(chunk.request_id, tell_nodes=not ended_itself)

    # ends, and new attempts

    def _end(self, request_id: str, tell_nodes: bool = True) -> Iterator[Command]:
        route = self.routes.pop(request_id, None)
        if route is None:
            return
        if route.phase is Phase.WAITING:
            self._waiting.remove(route)
            self._may_place = True  # the node that was kept free for it is open again
        else:
            yield from self._withdraw(route, tell_nodes)

    def _withdraw(self, route: Route, tell_nodes: bool = True) -> Iterator[Command]:
        """Take a request off its nodes."""
        self._leave_prefill(route)
        self._leave_decode(route)
        cancel = CancelRequest(route.request.request_id, route.generation)
        names = (route.prefill, route.decode) if tell_nodes else ()
        for name in names:
            if name in self.nodes:
                yield SayToNode(name, cancel)

    def _failed(self, name: str, failed: RequestFailed, now_s: float) -> Iterator[Command]:
        route = self._current(failed.request_id, failed.generation)
        if route is None or route.phase is Phase.WAITING:
            return
        if name == route.prefill and not route.needs_prefill:
            return  # it has handed over, and what happens to it meanwhile does not matter any more
        if failed.retryable:
            route.avoids = (route.prefill, route.decode)
            yield from self._try_again(route, failed.reason, failed.message, now_s, rest_s=REST_S)
        else:
            yield FailRequest(failed.request_id, failed.reason, failed.message)
            yield from self._end(failed.request_id)

    def _try_again(
        self, route: Route, reason: str, message: str, now_s: float, rest_s: float
    ) -> Iterator[Command]:
        request_id = route.request.request_id
        if route.tokens_count > route.tokens_sent_count + 1:  # it has decoded, so it is not what breaks nodes
            route.attempts_count = 0
        rest_s *= 2**route.attempts_count * (1 + route.number * REST_SPREAD % 1)
        route.attempts_count += 1
        if route.attempts_count >= self.attempts_max:
            yield FailRequest(request_id, reason, message)
            yield from self._end(request_id)
            return
        self.retries_count += 1
        self.migrations_count += bool(route.outputs)  # the next node goes on from them
        yield from self._withdraw(route)
        route.generation += 1  # so that nothing of this attempt is heard while the next one waits
        self._waiting.rest(route, now_s + rest_s)

    def _node_lost(self, name: str, now_s: float) -> Iterator[Command]:
        node = self.nodes.pop(name, None)
        if node is None:
            return
        self._may_place = True  # so that a request which no other node can take is not left waiting
        for route in list(self.routes.values()):
            is_hit = route.decode == name or (route.prefill == name and route.needs_prefill)
            if is_hit and route.phase is not Phase.WAITING:
                message = f"{node.kind} node {name} was lost"
                yield from self._try_again(route, "node_lost", message, now_s, rest_s=0.0)
        self._wake_rested(now_s)  # they need not rest: the nodes that are left have not failed them

    def _extend_leases(self, now_s: float) -> Iterator[Command]:
        """Keep the pages of requests under way, and have nodes look for those that nobody keeps.

        Between first token and hand over only arriving latents keep a lease: if they stop, it shall end.
        """
        if now_s - self._extended_s < self._lease_s / 3:
            return
        self._extended_s = now_s
        by_node: dict[str, list[str]] = {}
        for request_id, route in self.routes.items():
            if route.phase is not Phase.WAITING:
                wanted = by_node.setdefault(route.decode, [])
                if route.phase is not Phase.DECODING or route.is_handed_over:
                    wanted.append(request_id)
        for name, request_ids in by_node.items():
            if name in self.nodes:
                yield SayToNode(name, ExtendLeases(tuple(request_ids)))
        for request_id, name in self._kept.items():
            if name in self.nodes:
                self._awaited[request_id] = name
                yield SayToNode(name, AwaitPages(request_id, self.routes[request_id].pages_wanted_count))
