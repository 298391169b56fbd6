"""Where a gateway's requests wait for their tokens: the router's commands carried out in one event loop."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

from cluster.errors import NodeUnavailable, Overloaded, TriviumError
from cluster.events import (
    Command,
    DeliverTokens,
    Event,
    FailRequest,
    FinishRequest,
    NodeSaid,
    RequestAdmitted,
    RequestCancelled,
    RoutedRequest,
    SayToNode,
    TimePassed,
)
from cluster.links import NodeLinks
from cluster.membership import View
from cluster.router import Router
from decode.messages import NodeReport

TICK_S = 0.05
REPORTS_EVERY_TICKS = 5
RETRY_AFTER_S = 1.0

Output = DeliverTokens | FinishRequest


class Desk:
    """All requests of one gateway; every method belongs to the gateway's event loop."""

    def __init__(self, name: str, secret: str, lease_s: float, requests_waiting_max: int):
        self.router = Router(lease_s)
        self.requests_waiting_max = requests_waiting_max
        self.tokens_per_s: dict[str, float] = {}
        self._links = NodeLinks(name, secret, self.tell)
        self._outputs: dict[str, asyncio.Queue[Output | FailRequest]] = {}
        self._seen: dict[str, tuple[float, int]] = {}
        self._ticking: asyncio.Task | None = None

    def start(self) -> None:
        """Let time pass for the router."""
        self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def follow(self, view: View) -> None:
        """Know the nodes of the newest view."""
        await self._links.follow(view)

    @property
    def requests_count(self) -> int:
        """Requests that have not ended."""
        return len(self._outputs)

    def new_request_id(self) -> str:
        """An id that no other request of any gateway has."""
        return uuid.uuid4().hex

    def admit(self, request: RoutedRequest) -> None:
        """Take a request, whose outputs `follow_outputs` then gives; raises Overloaded."""
        if self.router.requests_waiting_count >= self.requests_waiting_max:
            raise Overloaded(
                reason="TOO_MANY_WAITING",
                message=f"{self.router.requests_waiting_count} requests wait for a node already",
                field="gateway.requests_waiting_max",
                limit=str(self.requests_waiting_max),
                remedy="Send it again later, or add decode nodes.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._outputs[request.request_id] = asyncio.Queue()
        self.tell(RequestAdmitted(request))

    async def outputs(self, request_id: str) -> AsyncIterator[list[Output]]:
        """What a request has brought since the last time, until it has ended; raises TriviumError if it fails."""
        queue = self._outputs[request_id]
        while True:
            batch = [await queue.get()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            failed = next((output for output in batch if isinstance(output, FailRequest)), None)
            if failed is not None:
                raise unavailable(failed)
            yield batch
            if isinstance(batch[-1], FinishRequest):
                return

    def finish_now(self, request_id: str, reason: str) -> FinishRequest:
        """The end of a request that its client's side ends, as after a stop string."""
        route = self.router.routes.get(request_id)
        if route is None:  # its last output is still in the queue
            return next(output for output in self._left(request_id) if isinstance(output, FinishRequest))
        phases = self.router.phases(route, time.monotonic())
        return FinishRequest(request_id, reason, route.cached_tokens_count, phases)

    def _left(self, request_id: str) -> list[Output | FailRequest]:
        queue = self._outputs[request_id]
        return [queue.get_nowait() for _ in range(queue.qsize())]

    def leave(self, request_id: str) -> None:
        """Nobody waits for a request any more, whether it has ended or not."""
        self._outputs.pop(request_id, None)
        self.tell(RequestCancelled(request_id))

    def tell(self, event: Event) -> None:
        """Tell the router what happened, and do what it says."""
        if isinstance(event, NodeSaid) and isinstance(event.message, NodeReport):
            self._note_rate(event.message)
        for command in self.router.handle(event, time.monotonic()):
            self._do(command)

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
                if request_id in self._outputs:
                    self._outputs[request_id].put_nowait(command)

    async def _tick(self) -> None:
        ticks_count = 0
        while True:
            await asyncio.sleep(TICK_S)
            self.tell(TimePassed())
            ticks_count += 1
            if ticks_count % REPORTS_EVERY_TICKS == 0:
                self._links.ask_reports()

    def _note_rate(self, report: NodeReport) -> None:
        now_s = time.monotonic()
        before_s, before_count = self._seen.get(report.name, (now_s, report.tokens_count))
        if now_s > before_s:
            self.tokens_per_s[report.name] = (report.tokens_count - before_count) / (now_s - before_s)
        self._seen[report.name] = (now_s, report.tokens_count)


def unavailable(failed: FailRequest) -> TriviumError:
    """The error that a client sees for a request that nodes gave up."""
    return NodeUnavailable(
        reason=failed.reason.upper(),
        message=failed.message,
        remedy="Send the request again; if it goes on failing, see `trivium status`.",
        retry_after_s=RETRY_AFTER_S,
    )
