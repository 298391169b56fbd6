"""Two gateways at one decode node: neither starves the other, or itself."""

import itertools
from collections.abc import Iterator

import torch

from cluster.events import (
    NodeJoined,
    NodeSaid,
    RequestAdmitted,
    RequestCancelled,
    RoutedRequest,
    SayToNode,
    TimePassed,
)
from cluster.route import Phase
from cluster.router import Router
from decode.inbox import Inbox
from decode.messages import (
    AwaitPages,
    CancelRequest,
    NodeReport,
    ReservePages,
    SamplingParameters,
    TokenChunk,
)
from kernels.model.latent_cache import LatentCache, LatentLayout
from kernels.model.pages import PAGE_TOKENS
from prefill.messages import FirstTokenChunk

PAGES_COUNT = 10
LEASE_S = 6.0
TICK_S = 0.1
LASTS_S = 1.0


class Rivals:
    """Two routers and an inbox; reserved requests last a while."""

    def __init__(self) -> None:
        self.now_s = 0.0
        layout = LatentLayout(3, 1, torch.float32)
        cache = LatentCache(1, layout, PAGES_COUNT * PAGE_TOKENS * layout.row_bytes)
        self.pool = cache.pool
        self.inbox = Inbox(cache, "memory://d", LEASE_S, lambda: self.now_s)
        self.routers = {"a": Router(LEASE_S), "b": Router(LEASE_S)}
        self.ends: list[tuple[float, str, str]] = []
        self.numbers = itertools.count()
        for gateway, kind in itertools.product("ab", ("prefill", "decode")):
            self.tell(gateway, NodeJoined(kind, kind))
        self.report()

    def report(self) -> None:
        """Both gateways hear how much room there is."""
        free_count = self.pool.pages_free_count
        for gateway, kind in itertools.product("ab", ("prefill", "decode")):
            counts = (PAGES_COUNT, free_count if kind == "decode" else PAGES_COUNT, 0, 0, 0, 0, 1, 0)
            self.tell(gateway, NodeSaid(kind, NodeReport(kind, kind, "", 0, 0, 0, *counts)))

    def tell(self, gateway: str, event: object) -> None:
        """Have a router do what comes of an event."""
        for command in self.routers[gateway].handle(event, self.now_s):
            if isinstance(command, SayToNode) and command.name == "decode":
                for answer in self.say(gateway, command.message):
                    self.tell(gateway, NodeSaid("decode", answer))

    def say(self, gateway: str, message: object) -> Iterator[object]:
        """What the inbox answers."""
        match message:
            case ReservePages(request_id):
                yield self.inbox.reserve(message, gateway)
                self.ends.append((self.now_s + LASTS_S, gateway, request_id))
            case AwaitPages():
                self.inbox.await_pages(message, gateway)
            case CancelRequest(request_id, generation):
                self.inbox.cancel(request_id, generation)

    def admit(self, gateway: str, name: str, pages_count: int, priority: int = 0) -> None:
        """One more request."""
        sampling = SamplingParameters(tokens_max=pages_count * PAGE_TOKENS - 1)
        self.tell(gateway, RequestAdmitted(RoutedRequest(name, (5,), sampling, priority)))

    def tick(self, crowds: bool = False) -> None:
        """Time goes on: what has lasted long enough ends, and small requests come if it `crowds`."""
        self.now_s += TICK_S
        if crowds:
            self.admit("b", f"small-{next(self.numbers)}", 2)
        for end in [end for end in self.ends if end[0] <= self.now_s]:
            self.ends.remove(end)
            route = self.routers[end[1]].routes.get(end[2])
            if route is not None and route.phase is Phase.PREFILLING:
                chunk = TokenChunk(end[2], route.generation, 0, (7,), "stop")
                self.tell(end[1], NodeSaid("prefill", FirstTokenChunk(chunk, 0, 0.0)))
        for gateway in "ab":
            self.tell(gateway, TimePassed())
        self.report()


def test_a_large_request_gets_room_beside_another_gateways_small_ones():
    rivals = Rivals()
    for _ in range(20):
        rivals.tick(crowds=True)
    rivals.admit("a", "large", 9)
    assert rivals.routers["a"].routes["large"].phase is Phase.WAITING
    for _ in range(int((LEASE_S / 3 + 2 * LASTS_S) / TICK_S) + 1):
        rivals.tick(crowds=True)
    assert "large" not in rivals.routers["a"].routes, "it never had its turn"
    for _ in range(5):
        rivals.tick(crowds=True)
    assert rivals.pool.pages_free_count == 0, "what it waited for is not kept any longer"


def awaiting() -> Rivals:
    """Rivals of whom one has 6 of 10 pages taken, and waits for 6."""
    rivals = Rivals()
    rivals.admit("a", "running", 6)
    rivals.admit("a", "usual", 6)
    rivals.tick()
    assert rivals.inbox._awaiting[0] == AwaitPages("usual", 6)
    return rivals


def test_a_gateway_does_not_wait_for_pages_that_are_kept_for_itself():
    rivals = awaiting()
    rivals.admit("a", "urgent", 6, priority=1)
    for _ in range(int(3 * LASTS_S / TICK_S) + 3):
        rivals.tick()
    assert list(rivals.routers["a"].routes) == []


def test_a_node_hears_at_once_that_a_request_waits_no_more():
    rivals = awaiting()
    rivals.admit("b", "theirs", 4)
    assert rivals.routers["b"].routes["theirs"].phase is Phase.WAITING
    rivals.tell("a", RequestCancelled("usual"))
    rivals.tick()
    assert rivals.routers["b"].routes["theirs"].phase is Phase.PREFILLING
