"""The desk: what requests bring reaches who waits for it, and nothing is left of a request that has ended."""

import asyncio
import logging

import pytest

from cluster.desk import Desk, failure
from cluster.errors import InvalidRequest, NodeUnavailable, Overloaded
from cluster.events import (
    DeliverTokens,
    FailRequest,
    FinishRequest,
    NodeJoined,
    NodeLost,
    NodeSaid,
    Phases,
    RequestCancelled,
    RoutedRequest,
    TimePassed,
)
from decode.messages import NodeReport, SamplingParameters

PHASES = Phases(0, 0, 0, 0, 0)
GREEDY = SamplingParameters(temperature=0.0, tokens_max=4)


def new_desk(waiting_max: int = 4) -> Desk:
    """A desk that no node serves."""
    return Desk("gateway", "a secret", 10.0, waiting_max)


def admit(desk: Desk) -> str:
    """A request at the desk."""
    request_id = desk.new_request_id()
    desk.admit(RoutedRequest(request_id, (1, 2, 3), GREEDY, client_request_id="job 7"))
    return request_id


def report(name: str, kind: str, tokens_count: int = 0, epoch: int = 1) -> NodeReport:
    """A node's numbers."""
    return NodeReport(name, kind, "unix:///x", 0, 0, 0, 9, 9, 0, 0, tokens_count, 0, epoch, 0)


async def batches(desk: Desk, request_id: str) -> list[list]:
    """Everything that a request brings."""
    async with asyncio.timeout(5):
        return [batch async for batch in desk.outputs(request_id)]


def test_outputs_come_in_order_and_end():
    async def run() -> None:
        desk = new_desk()
        request_id = admit(desk)
        outputs = [DeliverTokens(request_id, (5,), ()), DeliverTokens(request_id, (6,), ())]
        outputs.append(FinishRequest(request_id, "length", 0, PHASES))
        for output in outputs:
            desk._do(output)
        assert await batches(desk, request_id) == [outputs]
        desk.leave(request_id)
        assert desk.requests_count == 0
        assert desk.router.routes == {}

    asyncio.run(run())


def test_a_failure_is_typed_and_tells_no_address(caplog):
    async def run() -> None:
        desk = new_desk()
        request_id = admit(desk)
        desk._do(FailRequest(request_id, "experts_unavailable", "nobody answers at unix:///tmp/x"))
        with pytest.raises(NodeUnavailable) as caught:
            await batches(desk, request_id)
        assert caught.value.reason == "EXPERTS_UNAVAILABLE"
        assert "/tmp" not in str(caught.value)
        assert caught.value.retry_after_s > 0

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert "unix:///tmp/x" in caplog.text
    assert "job 7" in caplog.text


def test_what_came_before_a_failure_is_given_first(caplog):
    async def run() -> None:
        desk = new_desk()
        request_id = admit(desk)
        tokens = DeliverTokens(request_id, (5,), ())
        desk._do(tokens)
        desk._do(FailRequest(request_id, "node_lost", "it went"))
        outputs = desk.outputs(request_id)
        assert await anext(outputs) == [tokens]
        with pytest.raises(NodeUnavailable):
            await anext(outputs)
        assert desk.report().failed_counts == {"node_lost": 1}

    asyncio.run(run())


def test_a_request_that_its_nodes_gave_up_may_still_be_finished_by_what_came_before():
    async def run() -> None:
        desk = new_desk()
        request_id = admit(desk)
        desk._do(DeliverTokens(request_id, (5,), ()))
        desk._do(FailRequest(request_id, "node_lost", "it went"))
        desk.router.handle(RequestCancelled(request_id), 0.0)  # as the router does when it gives one up
        await anext(desk.outputs(request_id))
        assert desk.finish_now(request_id, "stop_string").phases.total_s >= 0
        desk.leave(request_id)
        report = desk.report()
        assert (report.finished_counts, report.failed_counts) == ({"stop_string": 1}, {})

    asyncio.run(run())


def test_what_fails_again_is_the_clients_to_change():
    error = failure(FailRequest("r", "request_too_large", "it needs 9 pages"), "")
    assert isinstance(error, InvalidRequest)
    assert error.message == "it needs 9 pages"
    assert error.retry_after_s is None


def test_nobody_is_told_to_send_again_what_may_fail_again():
    error = failure(FailRequest("r", "no_next_token", "its logits are no numbers"), "")
    assert isinstance(error, NodeUnavailable)
    assert error.retry_after_s is None and error.remedy.startswith("Change the request")
    error = failure(FailRequest("r", "node_lost", "it went"), "")
    assert error.retry_after_s > 0 and "Send the request again" in error.remedy


def test_too_many_waiting_are_shed_and_leave_nothing():
    async def run() -> None:
        desk = new_desk(waiting_max=2)
        waiting = [admit(desk), admit(desk)]
        with pytest.raises(Overloaded) as caught:
            admit(desk)
        assert caught.value.limit == "2"
        assert desk.requests_count == 2
        desk.leave(waiting[0])
        admit(desk)

    asyncio.run(run())


def test_leaving_twice_or_without_admission_is_nothing():
    async def run() -> None:
        desk = new_desk()
        request_id = admit(desk)
        for _ in range(2):
            desk.leave(request_id)
        desk.leave("nobody")
        desk._do(DeliverTokens(request_id, (5,), ()))
        assert desk.requests_count == 0

    asyncio.run(run())


def test_a_request_ended_by_its_client_is_off_the_router_at_once():
    async def run() -> None:
        desk = new_desk()
        request_id = admit(desk)
        finish = desk.finish_now(request_id, "stop_string")
        assert finish.finish_reason == "stop_string"
        assert desk.router.routes == {}
        assert desk.requests_count == 1, "its client has not read the end yet"

    asyncio.run(run())


def test_time_goes_on_after_an_error(caplog, monkeypatch):
    async def run() -> None:
        desk = new_desk()
        handle, failures = desk.router.handle, []

        def failing(event, now_s):
            if isinstance(event, TimePassed) and len(failures) < 2:
                failures.append(event)
                raise KeyError("planted")
            ticked.set()
            return handle(event, now_s)

        ticked = asyncio.Event()
        monkeypatch.setattr(desk.router, "handle", failing)
        desk.start()
        async with asyncio.timeout(5):
            await ticked.wait()
        assert len(failures) == 2
        desk.close()

    asyncio.run(run())
    assert "planted" in caplog.text


def test_it_can_serve_with_a_node_of_each_kind_that_knows_experts():
    async def run() -> None:
        desk = new_desk()
        for name, kind in (("p", "prefill"), ("d", "decode")):
            desk.tell(NodeJoined(name, kind))
            assert not desk.can_serve
            desk.tell(NodeSaid(name, report(name, kind, epoch=0)))
        assert not desk.can_serve
        for name, kind in (("p", "prefill"), ("d", "decode")):
            desk.tell(NodeSaid(name, report(name, kind)))
        assert desk.can_serve
        desk.tell(NodeLost("d"))
        assert not desk.can_serve

    asyncio.run(run())


def test_rates_are_over_a_while_and_go_with_their_node(monkeypatch):
    async def run() -> None:
        desk = new_desk()
        desk.tell(NodeJoined("d", "decode"))
        for now_s, tokens_count in ((10.0, 100), (10.25, 200), (10.2501, 200), (11.0, 300)):
            monkeypatch.setattr("cluster.desk.time.monotonic", lambda now_s=now_s: now_s)
            desk.tell(NodeSaid("d", report("d", "decode", tokens_count)))
        assert desk.tokens_per_s == {"d": 200.0}
        desk.tell(NodeLost("d"))
        assert desk.tokens_per_s == {}

    asyncio.run(run())
