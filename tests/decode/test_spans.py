"""The spans that a traced request leaves on its two nodes, and that an untraced one leaves none."""

from collections import defaultdict

import pytest

from decode.messages import DOWN, CancelRequest, PageReservation, ReservePages
from kernels.transport.spans import Span, begin_trace, is_traceparent, place_under, span_id_of, trace_id_of
from prefill.messages import DOWN as PREFILL_DOWN
from prefill.messages import PrefillPrompt
from tests.checkpoints import random_prompt
from tests.fixtures import CHECKPOINT, GREEDY, Stage

STEP_S = 0.5


class Traced:
    """Traced requests on a stage, and what the nodes say about them; each step takes half a second."""

    def __init__(self, stage: Stage):
        self.stage = stage
        stage.gateway.forwards = False
        self.dispatches: dict[str, list[str]] = defaultdict(list)
        for kind, node in (("prefill", stage.prefill), ("decode", stage.decode)):
            node.trace_dispatches = lambda place, kind=kind: self._note(kind, place)

    def _note(self, kind: str, place: str) -> None:
        self.dispatches[kind].append(place)
        self.stage.now_s += STEP_S

    def ask(self, name: str, place: str, tokens_count: int = 40, generation: int = 1) -> None:
        """Begin a request, up to where its latents have come."""
        gateway, prompt = self.stage.gateway, tuple(random_prompt(CHECKPOINT, tokens_count))
        DOWN.send(gateway.decode, ReservePages(name, generation, prompt, tokens_count, GREEDY, place))
        self.stage.settle()
        reservation = gateway.heard(PageReservation)[-1]
        asked = (name, generation, prompt, tokens_count, GREEDY, reservation.address)
        PREFILL_DOWN.send(gateway.prefill, PrefillPrompt(*asked, traceparent=place))

    def take(self) -> dict[str, list[Span]]:
        """All spans, by name."""
        spans = defaultdict(list)
        for span in self.stage.prefill.spans.take() + self.stage.decode.spans.take():
            spans[span.name].append(span)
        return dict(spans)


@pytest.fixture
def traced(stage) -> Traced:
    """Two nodes and a gateway."""
    return Traced(stage)


def test_a_traced_request_leaves_a_span_of_each_thing(traced):
    place = place_under(begin_trace())
    traced.ask("r", place)
    traced.stage.settle()
    spans = traced.take()
    assert {name: len(some) for name, some in spans.items()} == dict.fromkeys(
        ["prefill queue", "prefill", "transfer", "latents", "decode"], 1
    )
    one = {name: some[0] for name, some in spans.items()}
    assert {span.trace_id for span in one.values()} == {trace_id_of(place)}
    assert {span.parent_id for span in one.values()} == {span_id_of(place)}
    assert one["prefill"].attributes == {
        "trivium.generation": 1,
        "trivium.prompt_tokens_count": 40,
        "trivium.cached_tokens_count": 0,
    }
    assert one["decode"].attributes == {
        "trivium.generation": 1,
        "trivium.tokens_count": GREEDY.tokens_max,
    }
    assert one["prefill queue"].end_s == pytest.approx(one["prefill"].begin_s, abs=0.01)
    assert one["prefill"].end_s - one["prefill"].begin_s == pytest.approx(STEP_S, abs=0.01)
    steps_count = GREEDY.tokens_max - 1
    assert one["decode"].end_s - one["decode"].begin_s == pytest.approx(steps_count * STEP_S, abs=0.01)
    assert one["latents"].begin_s <= one["prefill"].begin_s + 0.01
    assert one["latents"].end_s == pytest.approx(one["decode"].begin_s, abs=0.01)
    assert one["transfer"].begin_s == pytest.approx(one["prefill"].end_s, abs=0.01)


def test_only_the_first_decode_step_traces_its_dispatches(traced):
    traced.ask("r", begin_trace())
    traced.stage.settle()
    spans = traced.take()
    first, *further = traced.dispatches["decode"]
    assert is_traceparent(first) and span_id_of(first) == spans["decode"][0].span_id
    assert further == [""] * (GREEDY.tokens_max - 2)
    assert [span_id_of(place) for place in traced.dispatches["prefill"]] == [spans["prefill"][0].span_id]


def test_an_untraced_request_leaves_nothing(traced):
    traced.ask("r", "")
    traced.stage.settle()
    assert traced.take() == {}
    assert set(traced.dispatches["decode"]) == set(traced.dispatches["prefill"]) == {""}


def test_a_traced_request_among_others_traces_its_own(traced):
    place = begin_trace()
    for name, under in (("before", ""), ("traced", place), ("after", "")):
        traced.ask(name, under)
    traced.stage.settle()
    spans = traced.take()
    assert {len(some) for some in spans.values()} == {1}
    assert {span.trace_id for some in spans.values() for span in some} == {trace_id_of(place)}
    places = [one for one in traced.dispatches["decode"] if one]
    assert [span_id_of(one) for one in places] == [spans["decode"][0].span_id]


def test_two_traces_do_not_mix(traced):
    places = {name: begin_trace() for name in ("a", "b")}
    for name, place in places.items():
        traced.ask(name, place, generation=3)
    traced.stage.settle()
    for name, spans in traced.take().items():
        assert sorted(span.trace_id for span in spans) == sorted(map(trace_id_of, places.values())), name
        assert len({span.span_id for span in spans}) == 2
        assert all(span.attributes.get("trivium.generation", 3) == 3 for span in spans)


def test_what_was_found_in_pages_is_told(traced):
    for _ in range(2):
        traced.ask(f"r{traced.stage.now_s}", begin_trace(), tokens_count=150)
        traced.stage.settle()
    first, second = traced.take()["prefill"]
    assert first.attributes["trivium.cached_tokens_count"] == 0
    assert second.attributes["trivium.cached_tokens_count"] == 128


def test_one_that_is_cancelled_tells_how_far_it_came(traced):
    traced.ask("r", begin_trace())
    traced.stage.until(lambda: len(traced.dispatches["decode"]) == 2)
    DOWN.send(traced.stage.gateway.decode, CancelRequest("r", 1))
    traced.stage.settle()
    [span] = traced.take()["decode"]
    assert 1 <= span.attributes["trivium.tokens_count"] < GREEDY.tokens_max
