"""What a gateway counts of its requests, at its recorder and at the desk that feeds it."""

import asyncio

import pytest

from cluster.desk import Desk
from cluster.errors import NodeUnavailable, Overloaded
from cluster.events import (
    DeliverTokens,
    FailRequest,
    FinishRequest,
    NodeJoined,
    NodeLost,
    NodeSaid,
    Phases,
    RoutedRequest,
)
from cluster.gateway_report import OTHER, REASONS_MAX, GatewayRecorder, GatewayReport
from cluster.router import Router
from decode.messages import NodeReport, PageReservation, RequestFailed, SamplingParameters, TokenChunk
from prefill.messages import FirstTokenChunk

PHASES = Phases(queued_s=0.2, prefill_s=0.3, transfer_s=0.0, decode_s=1.5, total_s=2.0)
SAMPLING = SamplingParameters(tokens_max=100)


def told(recorder: GatewayRecorder) -> GatewayReport:
    """What a recorder tells of a gateway with no requests under way."""
    return recorder.report(Router(10.0))


def test_the_first_token_is_timed_from_admission_and_each_other_from_the_one_before():
    recorder = GatewayRecorder()
    recorder.admitted("a", 70, 10.0)
    recorder.delivered("a", 1, 10.4)
    recorder.delivered("a", 4, 10.8)
    recorder.finished("a", "length", 64, PHASES)
    report = told(recorder)
    assert report.time_to_first_token_s.count == 1
    assert report.time_to_first_token_s.total == pytest.approx(0.4)
    assert report.inter_token_s.count == 4
    assert report.inter_token_s.mean == pytest.approx(0.1)
    assert report.end_to_end_s.total == 2.0
    assert (report.queued_s.total, report.prefill_s.total) == (0.2, 0.3)
    assert report.transfer_s.count == 0
    assert (report.prompt_tokens_count, report.cached_tokens_count, report.output_tokens_count) == (70, 64, 5)
    assert (report.admitted_count, report.finished_counts) == (1, {"length": 1})


def test_each_request_ends_once():
    recorder = GatewayRecorder()
    for request_id in "abc":
        recorder.admitted(request_id, 1, 0.0)
    recorder.finished("a", "stop", 0, PHASES)
    recorder.failed("b", "node_lost")
    for _ in range(2):
        for request_id in "abc":
            recorder.left(request_id)
            recorder.finished(request_id, "stop", 0, PHASES)
            recorder.failed(request_id, "node_lost")
            recorder.delivered(request_id, 1, 1.0)
    report = told(recorder)
    assert report.finished_counts == {"stop": 1}
    assert report.failed_counts == {"node_lost": 1}
    assert report.cancelled_count == 1
    assert report.output_tokens_count == 0


def test_reasons_do_not_grow_without_end():
    recorder = GatewayRecorder()
    for number in range(3 * REASONS_MAX):
        recorder.admitted(str(number), 1, 0.0)
        recorder.failed(str(number), f"reason_{number}")
    counts = told(recorder).failed_counts
    assert len(counts) == REASONS_MAX + 1
    assert counts[OTHER] == 2 * REASONS_MAX


def test_those_who_wait_are_told_by_what_they_want():
    desk = Desk("gateway", "a secret", 10.0, 4)

    async def run() -> None:
        desk.admit(RoutedRequest("a", tuple(range(30)), SAMPLING))  # 130 tokens: 3 pages
        desk.admit(RoutedRequest("b", tuple(range(28)), SAMPLING))  # 128 tokens: 2 pages

    asyncio.run(run())
    report = desk.report()
    assert (report.requests_waiting_count, report.requests_running_count) == (2, 0)
    assert report.prompt_tokens_waiting_count == 58
    assert report.pages_waiting_count == 5
    desk.leave("a")
    assert desk.report().requests_waiting_count == 1
    assert desk.report().cancelled_count == 1


def test_a_request_that_is_shed_is_counted_as_that_alone():
    desk = Desk("gateway", "a secret", 10.0, 1)

    async def run() -> None:
        desk.admit(RoutedRequest("a", (1,), SAMPLING))
        with pytest.raises(Overloaded):
            desk.admit(RoutedRequest("b", (1,), SAMPLING))
        desk.leave("b")

    asyncio.run(run())
    assert (desk.report().shed_count, desk.report().admitted_count, desk.report().cancelled_count) == (
        1,
        1,
        0,
    )


def test_the_desk_feeds_its_recorder():
    desk = Desk("gateway", "a secret", 10.0, 4)

    async def run() -> None:
        for request_id in "ab":
            desk.admit(RoutedRequest(request_id, (1, 2, 3), SAMPLING))
        for command in (
            DeliverTokens("a", (5,), ()),
            DeliverTokens("a", (6, 7), ()),
            FinishRequest("a", "length", 2, PHASES),
            FailRequest("b", "node_lost", "it went"),
        ):
            desk._do(command)
        assert len([batch async for batch in desk.outputs("a")]) == 1
        with pytest.raises(NodeUnavailable):
            await anext(desk.outputs("b"))
        for request_id in "ab":
            desk.leave(request_id)

    asyncio.run(run())
    report = desk.report()
    assert (report.finished_counts, report.failed_counts) == ({"length": 1}, {"node_lost": 1})
    assert (report.prompt_tokens_count, report.output_tokens_count, report.cached_tokens_count) == (6, 3, 2)
    assert (report.time_to_first_token_s.count, report.inter_token_s.count) == (1, 2)
    assert report.cancelled_count == 0


def test_a_stop_string_is_a_finish():
    desk = Desk("gateway", "a secret", 10.0, 4)

    async def run() -> None:
        desk.admit(RoutedRequest("a", (1, 2, 3), SAMPLING))
        desk.finish_now("a", "stop_string")
        desk.leave("a")

    asyncio.run(run())
    assert desk.report().finished_counts == {"stop_string": 1}
    assert desk.report().cancelled_count == 0


def test_another_attempt_is_a_retry_and_behind_tokens_a_migration():
    router = Router(10.0)
    for name, kind in (("p", "prefill"), ("d", "decode")):
        router.handle(NodeJoined(name, kind), 0.0)
        report = NodeReport(name, kind, "", 0, 0, 0, 99, 99, 0, 0, 0, 0, 1, 0)
        router.handle(NodeSaid(name, report), 0.0)
    desk = Desk("gateway", "a secret", 10.0, 4)
    desk.router = router

    async def run() -> None:
        desk.admit(RoutedRequest("a", (1, 2, 3), SAMPLING))
        desk.tell(NodeSaid("d", RequestFailed("a", 1, "internal", "", retryable=True)))
        assert (desk.report().retried_count, desk.report().migrated_count) == (1, 0)
        route = router.routes["a"]
        router._wake_rested(float("inf"))
        desk.tell(NodeLost("nobody"))
        desk.tell(NodeSaid("d", PageReservation("a", route.generation, "memory://d")))
        first = FirstTokenChunk(TokenChunk("a", route.generation, 0, (7,)), 0, 0.2)
        desk.tell(NodeSaid("p", first))
        assert desk.report().requests_running_count == 1
        desk.tell(NodeLost("d"))
        assert (desk.report().retried_count, desk.report().migrated_count) == (2, 1)

    asyncio.run(run())
