"""Each step of a request, and each way to lose one, as a short story; its nodes say what the test wants."""

from dataclasses import dataclass, field

import pytest

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
from cluster.route import PRIORITY_S
from cluster.router import LOOKED_PAST_MAX, REST_S, Phase, Router
from decode.messages import (
    LENGTH,
    STOP,
    AwaitPages,
    CancelRequest,
    ExtendLeases,
    NodeReport,
    PageReservation,
    RequestFailed,
    ReservationRefused,
    ReservePages,
    SamplingParameters,
    TokenChunk,
    TokenChunks,
)
from kernels.model.pages import PAGE_TOKENS
from prefill.messages import FirstTokenChunk, HandedOver, PrefillPrompt
from tests.cluster.books import check_books

LEASE_S = 30.0


@dataclass
class Story:
    """A router, the time, and all that it was told and has commanded; its books are checked at each turn."""

    router: Router = field(default_factory=lambda: Router(LEASE_S, attempts_max=3))
    now_s: float = 0.0
    commands: list[Command] = field(default_factory=list)

    def tell(self, event: Event) -> list[Command]:
        commands = self.router.handle(event, self.now_s)
        self.commands += commands
        check_books(self.router)
        return commands

    def said(self, name: str, message: object) -> list[Command]:
        return self.tell(NodeSaid(name, message))

    def wait(self, seconds: float) -> list[Command]:
        self.now_s += seconds
        return self.tell(TimePassed())

    # nodes

    def join(self, name: str, pages: int = 10) -> list[Command]:
        kind = "prefill" if name.startswith("p") else "decode"
        self.tell(NodeJoined(name, kind))
        return self.report(name, pages, pages)

    def report(self, name: str, free: int, total: int) -> list[Command]:
        kind = self.router.nodes[name].kind
        return self.said(name, NodeReport(name, kind, "", 0, 0, 0, total, free, 0, total - free, 0, 0, 0, 0))

    # requests

    def admit(self, name: str, pages: int = 1, priority: int = 0) -> list[Command]:
        """A request whose prompt is half a page and whose outputs are the rest of its pages."""
        prompt = tuple(range(PAGE_TOKENS // 2))
        sampling = SamplingParameters(tokens_max=pages * PAGE_TOKENS - len(prompt))
        return self.tell(RequestAdmitted(RoutedRequest(name, prompt, sampling, priority)))

    def generation(self, name: str) -> int:
        return self.router.routes[name].generation

    def phase(self, name: str) -> Phase:
        return self.router.routes[name].phase

    def accepted(self, name: str) -> list[Command]:
        route = self.router.routes[name]
        address = f"memory://{route.decode}"
        return self.said(route.decode, PageReservation(name, route.generation, address))

    def refused(self, name: str, available: int) -> list[Command]:
        route = self.router.routes[name]
        return self.said(route.decode, ReservationRefused(name, route.generation, available))

    def first(self, name: str, token: int, finish: str | None = None) -> list[Command]:
        route = self.router.routes[name]
        chunk = TokenChunk(name, route.generation, len(route.outputs), (token,), finish)
        return self.said(route.prefill, FirstTokenChunk(chunk, 0, 0.25))

    def handed_over(self, name: str) -> list[Command]:
        route = self.router.routes[name]
        return self.said(route.prefill, HandedOver(name, route.generation, 0.5))

    def token(self, name: str, index: int, token: int, finish: str | None = None) -> list[Command]:
        route = self.router.routes[name]
        chunk = TokenChunk(name, route.generation, index, (token,), finish)
        return self.said(route.decode, TokenChunks((chunk,)))

    def failed(self, name: str, retryable: bool = True) -> list[Command]:
        route = self.router.routes[name]
        return self.said(
            route.prefill, RequestFailed(name, route.generation, "broken", "it broke", retryable)
        )

    def bring_to(self, name: str, phase: Phase) -> None:
        if phase is not Phase.RESERVING:
            self.accepted(name)
        if phase is Phase.DECODING:
            self.first(name, 100)

    def delivered(self, name: str) -> list[int]:
        mine = [c for c in self.commands if isinstance(c, DeliverTokens) and c.request_id == name]
        return [token for command in mine for token in command.token_ids]


def said_to(commands: list[Command], kind: type) -> list[tuple[str, object]]:
    """Node and message of each command that says a message of a kind."""
    said = [command for command in commands if isinstance(command, SayToNode)]
    return [(command.name, command.message) for command in said if isinstance(command.message, kind)]


def reserved(commands: list[Command]) -> list[tuple[str, str]]:
    """(request, decode node) of each reservation asked for."""
    return [(message.request_id, name) for name, message in said_to(commands, ReservePages)]


def cancelled(commands: list[Command]) -> list[str]:
    """Nodes that are to forget something."""
    return [name for name, _ in said_to(commands, CancelRequest)]


@pytest.fixture
def story() -> Story:
    """One prefill and one decode node of ten pages."""
    story = Story()
    story.join("p1")
    story.join("d1")
    return story


# the way of a request that nothing disturbs


@pytest.mark.parametrize("name", ["p", "d"])
def test_a_silent_node_keeps_what_it_has_and_gets_nothing_new_until_it_speaks(name):
    story = Story()
    story.join("p")
    story.join("d")
    story.admit("a")
    assert story.tell(NodeFellSilent(name)) == []
    assert reserved(story.admit("b")) == []
    assert reserved(story.report(name, 9, 10)) == [("b", "d")]
    assert story.generation("a") == 1
    story.tell(NodeFellSilent("nobody"))


def test_a_request_walks_down_and_its_tokens_come_up(story: Story):
    assert reserved(story.admit("r")) == [("r", "d1")]
    assert story.phase("r") is Phase.RESERVING

    [(node, prompt)] = said_to(story.accepted("r"), PrefillPrompt)
    assert (node, prompt.decode_address, prompt.generation) == ("p1", "memory://d1", 1)
    assert story.phase("r") is Phase.PREFILLING

    story.now_s = 1.0
    assert story.first("r", 100) == [DeliverTokens("r", (100,), ())]
    assert story.phase("r") is Phase.DECODING
    assert story.handed_over("r") == []

    story.now_s = 3.0
    assert story.token("r", 1, 101) == [DeliverTokens("r", (101,), ())]
    *_, finish = story.token("r", 2, 102, LENGTH)
    assert (finish.finish_reason, finish.phases.queued_s, finish.phases.prefill_s) == (LENGTH, 0.75, 0.25)
    assert (finish.phases.transfer_s, finish.phases.decode_s, finish.phases.total_s) == (0.5, 2.0, 3.0)
    assert story.router.routes == {}
    assert story.router.nodes["d1"].pages_available_count == 10


def test_a_request_that_the_decode_node_ended_is_not_cancelled_there(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    assert cancelled(story.token("r", 1, 101, STOP)) == []


def test_a_request_that_ends_with_its_first_token_gives_its_reservation_back(story: Story):
    story.admit("r")
    story.accepted("r")
    deliver, finish, *cancels = story.first("r", 100, STOP)
    assert (deliver.token_ids, finish.finish_reason) == ((100,), STOP)
    assert cancelled(cancels) == ["p1", "d1"]
    assert story.router.routes == {}


def test_an_id_may_not_be_used_twice_at_once(story: Story):
    story.admit("r")
    with pytest.raises(ValueError, match="r is under way already"):
        story.admit("r")


# order of tokens


def test_tokens_that_overtook_the_first_one_wait_for_it(story: Story):
    story.admit("r")
    story.accepted("r")
    assert story.token("r", 2, 102, LENGTH) == []
    assert story.token("r", 1, 101) == []
    deliver, finish, *_ = story.first("r", 100)
    assert deliver.token_ids == (100, 101, 102)
    assert finish.finish_reason == LENGTH


def test_a_token_said_twice_is_delivered_once(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.token("r", 1, 101)
    assert story.token("r", 1, 101) == []
    assert story.first("r", 100) == []
    assert story.delivered("r") == [100, 101]
    assert story.router.routes["r"].early == {}


# cancelling


@pytest.mark.parametrize("phase", [Phase.RESERVING, Phase.PREFILLING, Phase.DECODING])
def test_a_cancelled_request_is_taken_off_both_nodes(story: Story, phase: Phase):
    story.admit("r")
    story.bring_to("r", phase)
    assert cancelled(story.tell(RequestCancelled("r"))) == ["p1", "d1"]
    assert story.router.routes == {}
    assert story.router.nodes["d1"].pages_available_count == 10


def test_what_nodes_still_say_of_a_cancelled_request_is_not_heard(story: Story):
    story.admit("r")
    story.tell(RequestCancelled("r"))
    chunk = TokenChunk("r", 1, 0, (100,))
    messages = [
        PageReservation("r", 1, "memory://d1"),
        ReservationRefused("r", 1, 0),
        FirstTokenChunk(chunk, 0, 0.0),
        HandedOver("r", 1, 0.0),
        TokenChunks((chunk,)),
        RequestFailed("r", 1, "broken", "it broke", True),
    ]
    assert [story.said("d1", message) for message in messages] == [[]] * len(messages)


def test_a_waiting_request_that_is_cancelled_lets_the_next_one_go(story: Story):
    story.admit("running", pages=5)
    story.admit("large", pages=8)
    assert reserved(story.admit("small", pages=1)) == []
    assert reserved(story.tell(RequestCancelled("large"))) == [("small", "d1")]


def test_cancelling_a_request_that_is_not_there_does_nothing(story: Story):
    assert story.tell(RequestCancelled("nobody")) == []


# waiting for nodes and for room


def test_a_request_waits_for_nodes_that_have_told_their_numbers():
    story = Story()
    assert story.admit("r") == []
    assert story.join("p1") == []
    assert story.tell(NodeJoined("d1", "decode")) == []
    assert story.router.requests_waiting_count == 1
    assert reserved(story.report("d1", 10, 10)) == [("r", "d1")]


def test_refused_means_waiting_until_the_node_says_that_it_has_room(story: Story):
    story.admit("r", pages=5)
    assert story.refused("r", available=2) == []
    assert story.phase("r") is Phase.WAITING
    assert story.wait(100.0) == [SayToNode("d1", AwaitPages("r", 5))]
    assert story.report("d1", free=4, total=10) == []
    assert reserved(story.report("d1", free=5, total=10)) == [("r", "d1")]


def test_refused_by_one_node_means_asking_another(story: Story):
    story.join("d2")
    story.admit("r", pages=5)
    assert reserved(story.refused("r", available=2)) == [("r", "d2")]
    assert reserved(story.refused("r", available=2)) == []


def test_refused_requests_keep_their_order(story: Story):
    for name in ("first", "second", "third"):
        story.admit(name, pages=3)
    for name in ("first", "second", "third"):
        story.refused(name, available=0)
    assert reserved(story.report("d1", 10, 10)) == [("first", "d1"), ("second", "d1"), ("third", "d1")]


def test_reservations_on_their_way_take_room(story: Story):
    story.admit("a", pages=6)
    assert reserved(story.admit("b", pages=6)) == []
    story.accepted("a")
    assert reserved(story.first("a", 100, STOP)) == [("b", "d1")]


def test_small_requests_pass_a_large_one_on_other_nodes_but_not_where_it_waits(story: Story):
    story.join("d2")
    story.admit("x", pages=4)
    story.admit("y", pages=5)
    assert reserved(story.commands) == [("x", "d1"), ("y", "d2")]
    assert reserved(story.admit("large", pages=9)) == []
    assert reserved(story.admit("a", pages=2)) == [("a", "d2")]
    assert reserved(story.admit("b", pages=4)) == []
    # Even when the other node becomes the emptier one, the large request stays where room is kept for it.
    assert reserved(story.tell(RequestCancelled("y"))) == [("b", "d2")]
    assert reserved(story.tell(RequestCancelled("x"))) == [("large", "d1")]


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones(story: Story):
    for number in range(10):
        story.admit(f"early-{number}")
    story.admit("large", pages=10)
    for number in range(20):
        story.admit(f"late-{number}")
    placed: list[tuple[str, str]] = []
    for number in range(10):
        placed += reserved(story.tell(RequestCancelled(f"early-{number}")))
    assert placed == [("large", "d1")]


def test_the_router_does_not_look_past_many_requests_without_room(story: Story):
    story.join("d2", pages=20)
    story.admit("running", pages=20)
    for number in range(LOOKED_PAST_MAX):
        story.admit(f"large-{number}", pages=15)
    assert reserved(story.admit("small")) == []
    assert reserved(story.tell(RequestCancelled("large-0"))) == [("small", "d1")]


def test_priority_goes_before_age(story: Story):
    story.admit("running", pages=10)
    story.admit("usual", pages=10)
    story.admit("urgent", pages=10, priority=1)
    assert reserved(story.tell(RequestCancelled("running"))) == [("urgent", "d1")]


def test_age_goes_before_priority_in_the_end(story: Story):
    story.admit("running", pages=10)
    story.admit("usual", pages=10)
    story.wait(PRIORITY_S + 1)
    story.admit("urgent", pages=10, priority=1)
    assert reserved(story.tell(RequestCancelled("running"))) == [("usual", "d1")]


def test_thousands_of_waiting_requests_cost_a_look_at_a_few(story: Story, monkeypatch: pytest.MonkeyPatch):
    looks_count = 0

    def choose_nothing(*_: object) -> None:
        nonlocal looks_count
        looks_count += 1

    for number in range(5000):
        story.router.handle(RequestAdmitted(RoutedRequest(str(number), (1,), SamplingParameters())), 0.0)
    monkeypatch.setattr("cluster.router.choose_decode", choose_nothing)
    story.tell(RequestCancelled("0"))
    assert looks_count <= LOOKED_PAST_MAX


# requests that no node can ever take


def test_a_request_larger_than_every_node_fails_at_once(story: Story):
    [failed] = story.admit("r", pages=11)
    assert isinstance(failed, FailRequest)
    assert failed.reason == "request_too_large"
    assert "needs 11 pages" in failed.message and "decode node has 10" in failed.message
    assert story.router.routes == {}


def test_a_prompt_larger_than_every_prefill_node_fails_too():
    story = Story()
    story.join("p1", pages=1)
    story.join("d1")
    prompt = tuple(range(PAGE_TOKENS + 1))
    [failed] = story.tell(RequestAdmitted(RoutedRequest("r", prompt, SamplingParameters())))
    assert "the largest prefill node has 1" in failed.message


def test_a_large_request_waits_while_a_node_has_not_told_its_size(story: Story):
    story.tell(NodeJoined("d2", "decode"))
    assert story.admit("r", pages=11) == []
    assert reserved(story.report("d2", 20, 20)) == [("r", "d2")]


def test_a_waiting_request_fails_when_the_only_node_that_could_hold_it_is_lost(story: Story):
    story.join("d2", pages=20)
    story.admit("running", pages=20)
    assert story.admit("r", pages=15) == []
    commands = story.tell(NodeLost("d2"))
    failed = [command.request_id for command in commands if isinstance(command, FailRequest)]
    assert sorted(failed) == ["r", "running"]


# nodes that go


@pytest.mark.parametrize("lost", ["p1", "d1"])
@pytest.mark.parametrize("phase", [Phase.RESERVING, Phase.PREFILLING, Phase.DECODING])
def test_when_a_node_is_lost_the_request_goes_on_elsewhere(story: Story, phase: Phase, lost: str):
    story.admit("r")
    story.bring_to("r", phase)
    outputs = story.delivered("r")
    story.join("p2")
    story.join("d2")
    commands = story.tell(NodeLost(lost))
    left = "d1" if lost == "p1" else "p1"
    assert cancelled(commands) == [left]
    [(_, again)] = said_to(commands, ReservePages)
    assert again.token_ids == (*range(PAGE_TOKENS // 2), *outputs)
    assert again.prompt_tokens_count == PAGE_TOKENS // 2
    assert again.generation > 1

    story.accepted("r")
    story.first("r", 200)
    story.token("r", len(outputs) + 1, 201, STOP)
    assert story.delivered("r") == [*outputs, 200, 201]
    assert story.router.routes == {}


def test_the_prefill_node_may_go_once_latents_and_first_token_are_over(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.handed_over("r")
    assert story.tell(NodeLost("p1")) == []
    assert story.token("r", 1, 101, STOP)[0] == DeliverTokens("r", (101,), ())


def test_a_token_of_the_decode_node_proves_the_hand_over(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.token("r", 1, 101)
    assert story.tell(NodeLost("p1")) == []


def test_a_first_token_lost_with_its_node_is_computed_again_though_decode_goes_on(story: Story):
    story.admit("r")
    story.accepted("r")
    story.handed_over("r")
    story.token("r", 1, 101)
    story.join("p2")
    commands = story.tell(NodeLost("p1"))
    assert reserved(commands) == [("r", "d1")]
    assert story.delivered("r") == []
    story.accepted("r")
    story.first("r", 100)
    story.token("r", 1, 101, STOP)
    assert story.delivered("r") == [100, 101]


def test_what_an_earlier_attempt_still_says_is_not_heard(story: Story):
    story.join("d2")
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.tell(NodeLost("p1"))
    old = TokenChunk("r", 1, 1, (999,), STOP)
    waiting = story.said("d1", TokenChunks((old,)))
    story.join("p2")
    reserving = story.said("d1", TokenChunks((old,)))
    assert (waiting, reserving) == ([], [])
    assert story.said("p1", RequestFailed("r", 1, "broken", "it broke", False)) == []
    assert story.said("d1", PageReservation("r", 1, "memory://d1")) == []
    assert story.said("d1", ReservationRefused("r", 1, 0)) == []
    assert story.phase("r") is Phase.RESERVING


def test_a_node_that_comes_back_unannounced_has_forgotten_its_requests(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.tell(NodeJoined("d1", "decode"))
    assert story.phase("r") is Phase.WAITING
    assert reserved(story.report("d1", 10, 10)) == [("r", "d1")]


def test_a_lost_node_that_comes_back_starts_from_nothing(story: Story):
    story.admit("r", pages=3)
    story.bring_to("r", Phase.DECODING)
    story.handed_over("r")
    story.tell(NodeLost("p1"))
    story.join("p1")
    story.tell(RequestCancelled("r"))
    assert story.router.nodes["p1"].requests_count == 0
    assert story.router.nodes["p1"].tokens_sent_count == 0


def test_losing_a_node_that_is_not_known_does_nothing(story: Story):
    assert story.tell(NodeLost("d9")) == []
    assert story.report("d1", 10, 10) == []


def test_a_node_that_drains_keeps_its_requests_and_gets_no_more(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.tell(NodeDrained("d1"))
    assert story.admit("later") == []
    assert story.token("r", 1, 101) == [DeliverTokens("r", (101,), ())]
    assert reserved(story.join("d2")) == [("later", "d2")]


def test_a_retry_that_has_grown_leaves_no_tokens_on_its_prefill_node(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.token("r", 1, 101)
    story.join("d2")
    story.tell(NodeLost("d1"))
    assert story.router.nodes["p1"].tokens_sent_count == PAGE_TOKENS // 2 + 2
    story.accepted("r")
    story.first("r", 102)
    assert story.router.nodes["p1"].tokens_sent_count == 0


def test_the_second_attempt_does_not_count_as_queued(story: Story):
    story.admit("r")
    story.accepted("r")
    story.now_s = 1.0
    story.first("r", 100)
    story.join("d2")
    story.tell(NodeLost("d1"))
    story.now_s = 4.0
    story.accepted("r")
    *_, finish = [c for c in story.first("r", 101, STOP) if isinstance(c, FinishRequest)]
    phases = finish.phases
    assert (phases.queued_s, phases.prefill_s, phases.decode_s, phases.total_s) == (0.75, 0.25, 3.0, 4.0)


# failures that nodes tell


def test_a_failure_for_good_goes_to_the_client(story: Story):
    story.admit("r")
    story.accepted("r")
    failed, *cancels = story.failed("r", retryable=False)
    assert failed == FailRequest("r", "broken", "it broke")
    assert cancelled(cancels) == ["p1", "d1"]
    assert story.router.routes == {}


def test_a_prefill_node_that_fails_after_handing_over_ends_no_decoding(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.token("r", 1, 101)
    failed = RequestFailed("r", 1, "decode_unreachable", "latents could not be sent", True)
    assert story.said("p1", failed) == []
    assert story.said("d1", failed) != []


def test_a_failed_request_rests_longer_each_time_and_then_fails(story: Story):
    story.admit("r")
    assert reserved(story.failed("r")) == []
    assert story.router.requests_waiting_count == 1
    assert reserved(story.report("d1", 10, 10)) == []
    assert reserved(story.wait(REST_S)) == [("r", "d1")]
    story.failed("r")
    assert reserved(story.wait(REST_S)) == []
    assert reserved(story.wait(REST_S)) == [("r", "d1")]
    assert FailRequest("r", "broken", "it broke") in story.failed("r")
    assert story.router.routes == {}


def test_a_resting_request_may_be_cancelled(story: Story):
    story.admit("r")
    story.failed("r")
    assert story.tell(RequestCancelled("r")) == []
    assert story.wait(10.0) == []


def test_another_attempt_goes_to_other_nodes_if_there_are_any(story: Story):
    story.join("p2")
    story.join("d2")
    [(_, decode)] = reserved(story.admit("r"))
    prefill = story.router.routes["r"].prefill
    story.failed("r")
    [(_, other)] = reserved(story.wait(REST_S))
    assert {decode, other} == {"d1", "d2"}
    assert {prefill, story.router.routes["r"].prefill} == {"p1", "p2"}


def test_a_request_whose_nodes_are_lost_again_and_again_fails_with_the_reason(story: Story):
    story.admit("r")
    for number in (1, 2, 3):
        story.tell(NodeLost(f"d{number}"))
        story.join(f"d{number + 1}")
    assert FailRequest("r", "node_lost", "decode node d3 was lost") in story.commands
    assert story.router.routes == {}


# leases


def test_leases_are_extended_while_prompts_are_computed(story: Story):
    story.admit("r")
    story.admit("s")
    story.bring_to("s", Phase.PREFILLING)
    assert said_to(story.wait(LEASE_S / 3), ExtendLeases) == [("d1", ExtendLeases(("r", "s")))]
    assert story.wait(LEASE_S / 4) == []
    assert said_to(story.wait(LEASE_S / 4), ExtendLeases) == [("d1", ExtendLeases(("r", "s")))]


def test_losses_are_counted_anew_once_a_node_has_decoded_something(story: Story):
    story.admit("r")
    for number in range(1, 6):
        story.bring_to("r", Phase.DECODING)
        story.token("r", 2 * number - 1, 7)
        story.tell(NodeLost(f"d{number}"))
        story.join(f"d{number + 1}")
    assert len(story.delivered("r")) == 10
    for number in (6, 7):
        assert story.phase("r") is Phase.RESERVING
        story.bring_to("r", Phase.DECODING)  # the prefill node's token tells nothing of decode nodes
        story.tell(NodeLost(f"d{number}"))
        story.join(f"d{number + 1}")
    assert FailRequest("r", "node_lost", "decode node d7 was lost") in story.commands
    assert story.router.routes == {}


def test_requests_that_failed_together_come_back_one_by_one():
    story = Story()
    for name in ("p", "d"):
        story.join(name, pages=100)
    names = [f"r{number}" for number in range(8)]
    for name in names:
        story.admit(name)
    for name in names:
        story.failed(name)
    came_back = [len(reserved(story.wait(REST_S / 20))) for _ in range(41)]
    assert sum(came_back) == len(names) and max(came_back) == 1
    assert sum(came_back[:19]) == 0, "nobody rests shorter"


def test_a_request_without_room_has_its_node_keep_pages_from_other_gateways(story: Story):
    story.report("d1", 3, 10)
    story.admit("large", pages=8)
    assert said_to(story.wait(LEASE_S / 3), AwaitPages) == [("d1", AwaitPages("large", 8))]
    assert said_to(story.wait(LEASE_S / 3), AwaitPages) == [("d1", AwaitPages("large", 8))]
    story.report("d1", 8, 10)
    assert story.phase("large") is Phase.RESERVING
    assert said_to(story.wait(LEASE_S / 3), AwaitPages) == []


@pytest.fixture
def awaiting(story: Story) -> Story:
    """A node that keeps pages for a large request."""
    story.report("d1", 3, 10)
    story.admit("large", pages=8)
    story.wait(LEASE_S / 3)
    return story


FORGET_LARGE = SayToNode("d1", CancelRequest("large", 0))


def test_an_awaited_node_is_told_once_that_the_request_is_cancelled(awaiting: Story):
    assert awaiting.tell(RequestCancelled("large")) == [FORGET_LARGE]
    assert awaiting.wait(LEASE_S) == []


def test_an_awaited_node_is_told_that_the_request_went_to_another(awaiting: Story):
    reserve, forget = awaiting.join("d2")
    assert (reserve.name, forget) == ("d2", FORGET_LARGE)


def test_an_awaited_node_keeps_room_for_whom_it_refused(awaiting: Story):
    commands = awaiting.report("d1", 8, 10)
    assert reserved(commands) == [("large", "d1")]
    assert cancelled([*commands, *awaiting.refused("large", available=3)]) == []
    reserve, forget = awaiting.join("d2")
    assert (reserve.name, forget) == ("d2", FORGET_LARGE)


def test_who_comes_before_another_takes_its_node_over(awaiting: Story):
    assert awaiting.admit("urgent", pages=7, priority=2) == [FORGET_LARGE]
    assert said_to(awaiting.wait(LEASE_S / 3), AwaitPages) == [("d1", AwaitPages("urgent", 7))]


def test_no_pages_are_kept_for_a_request_that_no_prefill_node_takes(awaiting: Story):
    assert awaiting.tell(NodeLost("p1")) == [FORGET_LARGE]
    assert awaiting.wait(LEASE_S) == []


def test_nothing_is_said_to_an_awaited_node_that_is_lost(story: Story):
    story.report("d1", 3, 10)
    story.admit("large", pages=8)
    del story.router.nodes["d1"]
    assert said_to(story.wait(LEASE_S / 3), AwaitPages) == []


def test_a_lease_whose_latents_were_lost_on_the_way_is_let_end(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    # Named no more, so that the node frees it; spoken to, so that it looks.
    assert said_to(story.wait(LEASE_S), ExtendLeases) == [("d1", ExtendLeases(()))]
    story.said("d1", RequestFailed("r", 1, "lease_ended", "its latents did not come in time", True))
    assert reserved(story.wait(REST_S)) == [("r", "d1")]


def test_the_lease_of_a_request_that_decodes_is_extended_again(story: Story):
    story.admit("r")
    story.bring_to("r", Phase.DECODING)
    story.handed_over("r")
    assert said_to(story.wait(LEASE_S), ExtendLeases) == [("d1", ExtendLeases(("r",)))]
