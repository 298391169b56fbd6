"""The open loop against clients that behave as told, and against a real gateway."""

import asyncio
import time
from contextlib import aclosing

import pytest

from cluster.bench.load import plan_load
from cluster.bench.measure import measure
from cluster.bench.run import Live, prepare, run_workload, warm_up
from cluster.bench.settings import LengthShape, LoadSettings
from cluster.bench.workload import ModelLimits, PlannedRequest, Workload, as_requested
from cluster.client import Admitted, Client, Delta, Finished
from cluster.errors import Overloaded
from cluster.gateway_messages import Timing, Usage
from tests.cluster.served import load_transformer, running_nodes, served, view_of

MODEL = ModelLimits(100, 512)
END = Finished("length", Usage(8, 0, 3), Timing(0, 0, 0, 0, 0))


def workload_of(*times_s: float) -> Workload:
    """Requests at the times given."""
    requests = tuple(PlannedRequest(at_s, (), 8, 3, seed=number) for number, at_s in enumerate(times_s))
    return Workload("test", requests, 1.0, 8, 0)


class TellingClient:
    """Gives each request the events, waits and errors of a script."""

    def __init__(self, *script: object):
        self.script = script
        self.asked = []
        self.closed_count = 0

    async def generate(self, request, timeout_s):
        self.asked.append(request)
        try:
            for step in self.script:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.closed_count += 1


def ran(workload: Workload, *clients: TellingClient, cancel_after_s: float | None = None):
    """The run, and the counts that a progress bar would have shown in the end."""

    async def work():
        live = Live(len(workload.requests))
        task = asyncio.create_task(run_workload(workload, clients, MODEL, 5.0, live))
        if cancel_after_s is not None:
            await asyncio.sleep(cancel_after_s)
            task.cancel()
        return await task, live

    return asyncio.run(work())


def test_every_event_is_noted():
    client = TellingClient(
        Admitted("r", 8, 0), 0.05, Delta("a", (1,), ()), Delta("b", (), ()), 0.05, Delta("c", (2, 3), ()), END
    )
    run, live = ran(workload_of(0.0), client)
    [record] = run.records
    assert record.outcome == "completed"
    assert list(record.token_counts) == [1, 2]
    assert 0.05 <= record.ttft_s < 0.5
    assert 0.025 <= record.itl_s < 0.25
    assert record.sent_at_s <= record.admitted_at_s <= record.token_times_s[0] <= record.ended_at_s
    assert (live.sent_count, live.completed_count, live.in_flight_count, live.tokens_count) == (1, 1, 0, 3)
    assert client.asked[0] == as_requested(run.workload, 0, MODEL.vocab_size)
    assert client.asked[0].sampling.ignore_eos and client.asked[0].sampling.tokens_max == 3


def test_a_late_server_does_not_slow_arrivals():
    run, _ = ran(workload_of(*(index * 0.01 for index in range(20))), TellingClient(1.0, END))
    assert max(record.sent_at_s for record in run.records) < min(record.ended_at_s for record in run.records)
    assert all(record.sent_at_s >= record.planned.at_s for record in run.records)


def test_errors_are_records_and_clients_take_turns():
    shedding = TellingClient(Overloaded("QUEUE_FULL", "full", retry_after_s=1.0))
    ending = TellingClient(Admitted("r", 8, 0))
    run, live = ran(workload_of(0.0, 0.0, 0.0), shedding, ending)
    assert [(record.outcome, record.error_reason) for record in run.records] == [
        ("shed", "QUEUE_FULL"),
        ("failed", "NO_FINISH"),
        ("shed", "QUEUE_FULL"),
    ]
    assert (live.failed_count, live.in_flight_count) == (3, 0)


def test_an_error_that_nobody_expected_is_of_one_request():
    run, live = ran(workload_of(0.0, 0.0), TellingClient(OSError("gone")), TellingClient(END))
    assert [(record.outcome, record.error_kind) for record in run.records] == [
        ("failed", "OSError"),
        ("completed", ""),
    ]
    assert measure("x", "", run, 1.0, 1.0).outcomes.reasons == {"OSError: UNEXPECTED": 1}
    assert (live.failed_count, live.completed_count) == (1, 1)


def test_a_warm_up_is_as_long_as_the_load_and_of_other_tokens():
    settings = LoadSettings(rate_per_s=10.0, duration_s=10.0, prefix_share=1.0)
    workload = plan_load(settings, MODEL)
    client, other = TellingClient(0.05, END), TellingClient(Overloaded("QUEUE_FULL", "full"))
    started = time.monotonic()
    asyncio.run(warm_up(workload, (client, other), MODEL, 5.0))
    assert time.monotonic() - started < 1, "all at once, and a refusal is none of its business"
    sent = client.asked + other.asked
    assert len(sent) == 32
    planned = {(one.prompt_tokens_count, one.output_tokens_count) for one in workload.requests}
    assert {(len(one.token_ids), one.sampling.tokens_max) for one in sent} <= planned
    asked = {as_requested(workload, index, 100).token_ids[:8] for index in range(len(workload.requests))}
    assert not asked & {one.token_ids[:8] for one in sent if len(one.token_ids) >= 8}


def test_a_cancellation_cancels_all_and_still_reports():
    client = TellingClient(Delta("a", (1,), ()), 60.0, END)
    started = time.monotonic()
    run, live = ran(workload_of(0.0, 0.0, 60.0), client, cancel_after_s=0.1)
    assert time.monotonic() - started < 5
    assert run.was_interrupted
    assert [record.outcome for record in run.records] == ["cancelled", "cancelled"]
    assert client.closed_count == 2
    assert live.in_flight_count == 0
    assert measure("x", "", run, 1.0, 1.0).outcomes.cancelled == 2


def test_a_real_gateway_agrees_with_what_was_measured(tmp_path):
    settings = LoadSettings(
        rate_per_s=8.0,
        duration_s=2.0,
        gap_cv=0.3,
        scale=1.0,
        prompt=LengthShape(150, 150, 150),
        output=LengthShape(24, 24, 24),
        prefix_share=0.9,
    )

    async def work(view):
        async with served(view) as gateway, Client(gateway.address) as one, Client(gateway.address) as other:
            model = await prepare(one, 10.0)
            workload = plan_load(settings, model)
            run = await run_workload(workload, (one, other), model, 20.0, Live(len(workload.requests)))
            async with aclosing(one.generate(as_requested(workload, 0, model.vocab_size))) as events:
                again = [
                    token async for event in events if isinstance(event, Delta) for token in event.token_ids
                ]
            await gateway.is_idle()
            return run, again

    with running_nodes(load_transformer(), tmp_path) as nodes:
        run, again = asyncio.run(work(view_of(nodes)))
    report = measure("real", "", run, 5.0, 1.0)
    assert report.outcomes.completed == 16
    assert len(again) == run.records[0].planned.output_tokens_count
    for record in run.records:
        assert sum(record.token_counts) == record.usage.output_tokens_count
        assert record.usage.output_tokens_count == record.planned.output_tokens_count
        assert record.usage.prompt_tokens_count == record.planned.prompt_tokens_count
        assert record.admitted_at_s >= record.sent_at_s
    late_s = report.sender.lateness_s.mean
    assert report.latency.e2e_s.mean - late_s == pytest.approx(report.server.total_s.mean, rel=0.1, abs=0.03)
    served_first_s = [
        sum((timing.queued_s, timing.prefill_s)) for timing in (record.timing for record in run.records)
    ]
    assert report.latency.ttft_s.mean - late_s == pytest.approx(sum(served_first_s) / 16, rel=0.1, abs=0.03)
    assert report.latency.itl_s.mean * 23 == pytest.approx(report.server.decode_s.mean, rel=0.1, abs=0.03)
    assert report.goodput.share == 1.0
