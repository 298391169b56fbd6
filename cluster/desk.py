"""Where a gateway's requests wait for their tokens: the router's commands carried out in one event loop."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.errors import InvalidRequest, NodeUnavailable, Overloaded, TriviumError
from cluster.events import (
    Command,
    DeliverTokens,
    Event,
    FailRequest,
    FinishRequest,
    NodeLost,
    NodeSaid,
    RequestAdmitted,
    RequestCancelled,
    RoutedRequest,
    SayToNode,
    TimePassed,
)
from cluster.gateway_report import GatewayRecorder, GatewayReport
from cluster.links import NodeLinks
from cluster.route import Route
from cluster.router import Router
from cluster.view import View
from decode.messages import NodeReport

logger = logging.getLogger(__name__)

TICK_S = 0.05
REPORTS_EVERY_TICKS = 5
RATE_OVER_S = 0.5
RETRY_AFTER_S = 1.0
UNSERVABLE = ("request_too_large", "invalid_prompt")  # reasons for which the same request fails again
DOUBTFUL = ("no_next_token",)  # reasons for which it may

Output = DeliverTokens | FinishRequest


@dataclass
class Seat:
    """Where one request waits for what its nodes bring."""

    request: RoutedRequest
    route: Route | None = None
    """The router's, which the router forgets when it gives the request up."""
    outputs: asyncio.Queue[Output | FailRequest] = field(default_factory=asyncio.Queue)


class Desk:
    """All requests of one gateway; every method belongs to the gateway's event loop."""

    def __init__(self, name: str, secret: str, lease_s: float, requests_waiting_max: int):
        self.router = Router(lease_s)
        self.requests_waiting_max = requests_waiting_max
        self.tokens_per_s: dict[str, float] = {}
        self._recorder = GatewayRecorder()
        self._links = NodeLinks(name, secret, self.tell)
        self._seats: dict[str, Seat] = {}
        self._seen: dict[str, tuple[float, int]] = {}
        self._entering_count = 0
        self._ticking: asyncio.Task | None = None

    def start(self) -> None:
        """Let time pass for the router."""
        self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def follow(self, view: View) -> None:
        """Know the nodes of the newest view."""
        await self._links.follow(view)

    @property
    def can_serve(self) -> bool:
        """Whether a node of each kind takes requests and knows where experts are, as it has said itself."""
        ready = [node for node in self.router.nodes.values() if node.is_ready]
        return {"prefill", "decode"} <= {node.kind for node in ready if node.report.experts_epoch > 0}

    @property
    def requests_count(self) -> int:
        """Requests that have not ended, and calls that may become some."""
        return self._entering_count + len(self._seats)

    def new_request_id(self) -> str:
        """An id that no other request of any gateway has."""
        return uuid.uuid4().hex

    @contextmanager
    def entering(self) -> Iterator[None]:
        """Count a call among those that wait while it is read and validated; raises Overloaded."""
        self._check_room()
        self._entering_count += 1
        try:
            yield
        finally:
            self._entering_count -= 1

    def admit(self, request: RoutedRequest, called_s: float | None = None) -> None:
        """Take a request, whose outputs `outputs` then gives until `leave`; raises Overloaded.

        Its times in the report count from `called_s`, when its call came, where that is known.
        """
        self._check_room()
        seat = self._seats[request.request_id] = Seat(request)
        begin_s = time.monotonic() if called_s is None else called_s
        self._recorder.admitted(request.request_id, len(request.token_ids), begin_s)
        self.tell(RequestAdmitted(request))
        seat.route = self.router.routes.get(request.request_id)

    def _check_room(self) -> None:
        waiting_count = self._entering_count + self.router.requests_waiting_count
        if waiting_count >= self.requests_waiting_max:
            self._recorder.shed()
            raise Overloaded(
                reason="TOO_MANY_WAITING",
                message=f"{waiting_count} requests wait already",
                field="gateway.requests_waiting_max",
                limit=str(self.requests_waiting_max),
                remedy="Send it again later, or add decode nodes.",
                retry_after_s=RETRY_AFTER_S,
            )

    async def outputs(self, request_id: str) -> AsyncIterator[list[Output]]:
        """What a request has brought since the last time, to its end; raises TriviumError if it fails."""
        seat = self._seats[request_id]
        while True:
            batch = [await seat.outputs.get()]
            while not seat.outputs.empty():
                batch.append(seat.outputs.get_nowait())
            failed = batch.pop() if isinstance(batch[-1], FailRequest) else None
            if batch:
                yield batch
            if failed is not None:
                self._recorder.failed(request_id, failed.reason)
                raise failure(failed, seat.request.client_request_id)
            if isinstance(batch[-1], FinishRequest):
                return

    def finish_now(self, request_id: str, reason: str) -> FinishRequest:
        """End a request under way, as after a stop string: its nodes are free of it at once."""
        route = self._seats[request_id].route
        phases = route.phases(time.monotonic())
        self._recorder.finished(request_id, reason, route.cached_tokens_count, phases)
        self.tell(RequestCancelled(request_id))
        return FinishRequest(request_id, reason, route.cached_tokens_count, phases)

    def leave(self, request_id: str) -> None:
        """Nobody waits for a request any more, whether it has ended or not."""
        self._seats.pop(request_id, None)
        self._recorder.left(request_id)
        self.tell(RequestCancelled(request_id))

    def tell(self, event: Event) -> None:
        """Tell the router what happened, and do what it says."""
        if isinstance(event, NodeSaid) and isinstance(event.message, NodeReport):
            self._note_rate(event.message)
        if isinstance(event, NodeLost):
            self._seen.pop(event.name, None)
            self.tokens_per_s.pop(event.name, None)
        for command in self.router.handle(event, time.monotonic()):
            self._do(command)

    def report(self) -> GatewayReport:
        """Numbers about this gateway's requests."""
        return self._recorder.report(self.router)

    def close(self) -> None:
        """Let go of the nodes, which then free what this gateway had there."""
        if self._ticking is not None:
            self._ticking.cancel()
        self._links.close()

    def _do(self, command: Command) -> None:
        match command:
            case SayToNode(name, message):
                self._links.send(name, message)
            case DeliverTokens(request_id) | FinishRequest(request_id) | FailRequest(request_id):
                if request_id in self._seats:
                    self._seats[request_id].outputs.put_nowait(command)
                    self._record(command)

    def _record(self, command: Output) -> None:
        match command:
            case DeliverTokens(request_id, token_ids):
                self._recorder.delivered(request_id, len(token_ids), time.monotonic())
            case FinishRequest(request_id, reason, cached_tokens_count, phases):
                self._recorder.finished(request_id, reason, cached_tokens_count, phases)

    async def _tick(self) -> None:
        ticks_count = 0
        while True:
            await asyncio.sleep(TICK_S)
            ticks_count += 1
            try:
                self.tell(TimePassed())
                if ticks_count % REPORTS_EVERY_TICKS == 0:
                    self._links.ask_reports()
            except Exception:
                logger.exception("time could not pass for the router; it goes on with the next tick")

    def _note_rate(self, report: NodeReport) -> None:
        now_s = time.monotonic()
        before_s, before_count = self._seen.setdefault(report.name, (now_s, report.tokens_count))
        if now_s - before_s >= RATE_OVER_S:  # reports that waited come together, and tell no rate
            self.tokens_per_s[report.name] = (report.tokens_count - before_count) / (now_s - before_s)
            self._seen[report.name] = (now_s, report.tokens_count)


def failure(failed: FailRequest, client_request_id: str) -> TriviumError:
    """The error that a client sees; what nodes say may name addresses, and goes to the log alone."""
    reason = failed.reason.upper()
    if failed.reason in UNSERVABLE:
        return InvalidRequest(
            reason, failed.message, field="request", remedy="Change it; it would fail again."
        )
    logger.warning(
        "request %s (%s) failed: %s: %s",
        failed.request_id,
        client_request_id or "its client gave it no name",
        failed.reason,
        failed.message,
    )
    is_doubtful = failed.reason in DOUBTFUL
    remedy = "Change the request" if is_doubtful else "Send the request again"
    return NodeUnavailable(
        reason,
        f"nodes gave the request up: {failed.reason.replace('_', ' ')}",
        remedy=f"{remedy}; if it goes on failing, see `trivium status`.",
        retry_after_s=None if is_doubtful else RETRY_AFTER_S,
    )
