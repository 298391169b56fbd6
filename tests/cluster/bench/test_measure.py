"""Numbers of hand-made runs, worked out by hand."""

import json
import time
from dataclasses import fields

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as some

from cluster.bench.measure import measure, peaks_in, percentiles_in, spread
from cluster.bench.report import Report, Spread, to_json
from cluster.bench.table import rows, warnings
from tests.cluster.bench.records import finished, planned, refused, run_of, small_run


def report_of(run, slo_ttft_s: float = 1.0, slo_itl_s: float = 0.2) -> Report:
    """The report of a run."""
    return measure("here", "2026-01-01T00:00:00+00:00", run, slo_ttft_s, slo_itl_s)


def test_goodput_counts_over_all_that_was_offered():
    good = report_of(small_run()).goodput
    assert (good.good, good.share, good.good_per_s) == (2, 0.25, 0.2)
    assert report_of(small_run(), slo_ttft_s=2.0).goodput.good == 3
    assert report_of(small_run(), slo_itl_s=0.5).goodput.good == 3
    assert report_of(small_run(), slo_itl_s=0.05).goodput.good == 1


def test_every_end_is_counted_apart():
    ends = report_of(small_run()).outcomes
    assert (ends.offered, ends.completed, ends.shed, ends.expired, ends.cancelled, ends.failed) == (
        8,
        4,
        1,
        1,
        1,
        1,
    )
    assert ends.reasons == {
        "Overloaded: QUEUE_FULL": 1,
        "DeadlinePassed: DEADLINE_EXCEEDED": 1,
        "Cancelled: CANCELLED": 1,
        "NodeUnavailable: NO_NODE": 1,
    }


def test_latencies_are_of_tokens_and_not_of_deliveries():
    run = run_of(finished(planned(0.0), 0.1, [(0.6, 2), (0.7, 1), (1.0, 3)]))
    latency = report_of(run).latency
    assert latency.itl_s.count == 4
    assert latency.itl_s.mean == pytest.approx(0.1)
    assert run.records[0].itl_s == pytest.approx(0.1)


def test_latencies_count_from_when_a_request_was_due():
    run = run_of(finished(planned(1.0), 1.75, [(2.0, 1), (2.5, 3)]))  # sent late
    report = report_of(run, slo_ttft_s=0.5)
    assert report.latency.ttft_s.mean == pytest.approx(1.0)
    assert report.latency.e2e_s.max == pytest.approx(1.5)
    assert report.goodput.good == 0
    assert report.server.total_s.max == pytest.approx(0.75)


def test_a_bucket_of_few_has_no_p99():
    few = [finished(planned(index / 100), index / 100, [(1.5, 1)]) for index in range(99)]
    assert report_of(run_of(*few)).seconds.ttft_p99_s == [None] * 10
    many = report_of(run_of(*few, finished(planned(0.99), 0.99, [(1.5, 1)]))).seconds
    assert many.ttft_p50_s[1] < many.ttft_p99_s[1] < 1.5


def test_percentiles_are_those_of_their_buckets():
    generator = numpy.random.default_rng(1)
    times_s, values = generator.random(5000) * 4, generator.random(5000)
    p50, p99 = percentiles_in(times_s, values, numpy.arange(6.0))
    for second in range(4):
        inside = values[(times_s >= second) & (times_s < second + 1)]
        assert (p50[second], p99[second]) == tuple(numpy.percentile(inside, [50, 99]).tolist())
    assert (p50[4], p99[4]) == (None, None)


def test_long_runs_are_read_in_moderate_time():
    generator = numpy.random.default_rng(1)
    times_s, values = generator.random(2_000_000) * 600, generator.random(2_000_000)
    started = time.process_time()
    percentiles_in(times_s, values, numpy.arange(601.0))
    assert time.process_time() - started < 5


def test_rates_shares_and_lateness():
    report = report_of(small_run())
    assert report.offer.offered_per_s == pytest.approx(0.8)
    assert report.throughput.completed_per_s == pytest.approx(0.4)
    assert report.throughput.output_tokens_per_s == pytest.approx(1.6)
    assert report.throughput.prompt_tokens_per_s == pytest.approx(4.0)
    assert report.throughput.prefix_cached_share == pytest.approx(5 / 40)
    assert report.sender.lateness_s.max == pytest.approx(0.001)
    assert report.server.queued_s.mean == pytest.approx(0.1)
    assert set(report.latency.ttft_s_by_priority) == {"0", "5"}


def test_the_run_second_by_second():
    seconds = report_of(small_run()).seconds
    assert seconds.width_s == 1.0
    assert seconds.offered == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert seconds.completed == [1, 1, 0, 0, 2, 0, 0, 0, 0, 0]
    assert seconds.not_completed == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert seconds.in_flight == [1, 1, 1, 2, 3, 1, 1, 1, 0, 0]
    assert seconds.output_tokens == [4, 4, 0, 1, 7, 0, 0, 0, 0, 0]
    assert seconds.ttft_p50_s[:3] == [pytest.approx(0.501), pytest.approx(0.2), None]
    assert seconds.itl_p99_s[1] is None


def test_long_runs_have_wider_buckets():
    seconds = report_of(run_of(refused(planned(), 0.0, "Internal", "X"), elapsed_s=86_400.0)).seconds
    assert seconds.width_s == 144.0
    assert len(seconds.offered) == 600


def test_runs_in_which_nothing_came():
    for run in (run_of(), run_of(refused(planned(), 0.0, "Internal", "INTERNAL"), elapsed_s=0.001)):
        report = report_of(run)
        assert report.latency.ttft_s is None
        assert report.goodput.share == 0.0
        assert json.loads(to_json([report]))["reports"][0]["quantiles"]["ttft_s"] == []
        assert rows([report])


def test_an_interrupted_run_offered_for_as_long_as_it_lasted():
    run = run_of(finished(planned(), 0.0, [(0.5, 4)]), elapsed_s=2.0, was_interrupted=True)
    report = report_of(run)
    assert report.offer.duration_s == 2.0
    assert "interrupted" in warnings([report])[0]


def test_a_late_load_generator_is_told():
    run = run_of(finished(planned(0.0), 0.5, [(0.6, 4)]))
    assert "500 ms late" in warnings([report_of(run)])[0]
    assert warnings([report_of(small_run())]) == []


@given(some.lists(some.floats(0, 1e6), min_size=1, max_size=50))
def test_spreads_are_ordered_and_are_numpys(values):
    found = spread(values)
    assert found.p50 <= found.p90 <= found.p99 <= found.max == max(values)
    assert found.p90 == pytest.approx(numpy.percentile(values, 90))


@given(some.lists(some.tuples(some.floats(0, 9.9), some.floats(0, 5)), max_size=20))
def test_no_bucket_ever_holds_more_than_were_there(spans):
    starts, ends = [start for start, _ in spans], [start + long for start, long in spans]
    peaks = peaks_in(starts, ends, numpy.arange(16.0))
    assert max(peaks) <= len(spans)
    for start in starts:
        assert peaks[int(start)] >= 1


def test_the_json_has_the_fields_of_the_dataclasses():
    values = json.loads(to_json([report_of(small_run())]))
    assert values["schema"] == "trivium.bench/1"
    [report] = values["reports"]
    assert list(report) == [field.name for field in fields(Report)]
    assert list(report["latency"]["ttft_s"]) == [field.name for field in fields(Spread)]
