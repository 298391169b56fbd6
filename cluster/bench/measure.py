"""From what happened to what is told of it; pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy

from cluster.bench.record import CANCELLED, COMPLETED, EXPIRED, FAILED, SHED, RequestRecord, Run
from cluster.bench.report import (
    Goodput,
    Latency,
    Offer,
    Outcomes,
    Quantiles,
    Report,
    Seconds,
    Sender,
    ServerTiming,
    Spread,
    Throughput,
)

SECONDS_COUNT_MAX = 600
QUANTILES_COUNT = 201
P99_SAMPLES_MIN = 100  # with fewer the p99 of a bucket is its maximum
TIMINGS = ("queued_s", "prefill_s", "transfer_s", "decode_s", "total_s")


def measure(name: str, started_at: str, run: Run, slo_ttft_s: float, slo_itl_s: float) -> Report:
    """The report of a run."""
    gaps = token_gaps_s(run.records)
    return Report(
        name=name,
        started_at=started_at,
        was_interrupted=run.was_interrupted,
        offer=measure_offer(run),
        outcomes=count_outcomes(run.records),
        throughput=measure_throughput(run),
        latency=measure_latency(run.records, gaps[1]),
        goodput=measure_goodput(run, slo_ttft_s, slo_itl_s),
        server=measure_server(run.records),
        sender=Sender(spread([record.sent_at_s - record.planned.at_s for record in run.records])),
        seconds=measure_seconds(run, gaps),
        quantiles=Quantiles(*map(quantiles, (ttfts_s(run.records), gaps[1], e2es_s(run.records)))),
    )


def measure_offer(run: Run) -> Offer:
    """What was asked of the cluster; an interrupted run offered for as long as it lasted."""
    duration_s = offered_s(run)
    return Offer(
        name=run.workload.name,
        seed=run.workload.seed,
        planned_count=len(run.workload.requests),
        cut_count=run.workload.cut_count,
        duration_s=duration_s,
        offered_per_s=rate(len(run.records), duration_s),
        prompt_tokens=spread([record.planned.prompt_tokens_count for record in run.records]),
        output_tokens=spread([record.planned.output_tokens_count for record in run.records]),
        notes=list(run.workload.notes),
    )


def offered_s(run: Run) -> float:
    """How long requests were offered."""
    return min(run.workload.duration_s, run.elapsed_s) if run.was_interrupted else run.workload.duration_s


def measured_s(run: Run) -> float:
    """From the first second to the last answer, or to the end of the offer if that was later."""
    return max(offered_s(run), run.elapsed_s)


def count_outcomes(records: Sequence[RequestRecord]) -> Outcomes:
    """How often each outcome, and each reason of those that are no success."""
    counts = Counter(record.outcome for record in records)
    reasons = Counter(
        f"{record.error_kind}: {record.error_reason}" for record in records if record.outcome != COMPLETED
    )
    ends = (counts[outcome] for outcome in (COMPLETED, SHED, EXPIRED, CANCELLED, FAILED))
    return Outcomes(len(records), *ends, reasons=dict(reasons.most_common()))


def measure_throughput(run: Run) -> Throughput:
    """What came out in how long."""
    elapsed_s = measured_s(run)
    used = [record.usage for record in run.records if record.usage is not None]
    prompt_tokens = sum(usage.prompt_tokens_count for usage in used)
    cached_tokens = sum(usage.cached_tokens_count for usage in used)
    output_tokens = sum(sum(record.token_counts) for record in run.records)
    return Throughput(
        elapsed_s=elapsed_s,
        completed_per_s=rate(len(completed(run.records)), elapsed_s),
        output_tokens_per_s=rate(output_tokens, elapsed_s),
        prompt_tokens_per_s=rate(prompt_tokens, elapsed_s),
        prefix_cached_share=cached_tokens / prompt_tokens if prompt_tokens else None,
    )


def measure_latency(records: Sequence[RequestRecord], gaps_s: numpy.ndarray) -> Latency:
    """How long clients waited, with the inter-token latencies `[tokens]`."""
    by_priority: dict[int, list[RequestRecord]] = {}
    for record in records:
        by_priority.setdefault(record.planned.priority, []).append(record)
    spreads = {str(key): spread(ttfts_s(by_priority[key])) for key in sorted(by_priority)}
    return Latency(
        ttft_s=spread(ttfts_s(records)),
        itl_s=spread(gaps_s),
        e2e_s=spread(e2es_s(records)),
        ttft_s_by_priority={key: value for key, value in spreads.items() if value is not None},
    )


def measure_goodput(run: Run, slo_ttft_s: float, slo_itl_s: float) -> Goodput:
    """How many of the offered requests were served as they should be."""
    good_count = sum(is_good(record, slo_ttft_s, slo_itl_s) for record in run.records)
    return Goodput(
        slo_ttft_s,
        slo_itl_s,
        good_count,
        rate(good_count, len(run.records)),
        rate(good_count, measured_s(run)),
    )


def is_good(record: RequestRecord, slo_ttft_s: float, slo_itl_s: float) -> bool:
    """Whether a request was served within both bounds; one token alone has no ITL to miss."""
    if record.outcome != COMPLETED or record.ttft_s is None or record.ttft_s > slo_ttft_s:
        return False
    return record.itl_s is None or record.itl_s <= slo_itl_s


def measure_server(records: Sequence[RequestRecord]) -> ServerTiming:
    """The cluster's own account of completed requests."""
    timings = [record.timing for record in completed(records) if record.timing is not None]
    return ServerTiming(**{key: spread([getattr(timing, key) for timing in timings]) for key in TIMINGS})


def measure_seconds(run: Run, gaps: tuple[numpy.ndarray, numpy.ndarray]) -> Seconds:
    """The run in buckets of a second, or of several if it was long; `gaps` as of `token_gaps_s`."""
    end_s = max(measured_s(run), 1e-3)
    width_s = float(max(1, int(numpy.ceil(end_s / SECONDS_COUNT_MAX))))
    edges = numpy.arange(int(numpy.ceil(end_s / width_s)) + 1) * width_s
    ended = [(record.ended_at_s, record.outcome) for record in run.records if record.ended_at_s is not None]
    offered = count_in([record.planned.at_s for record in run.records], edges)
    done = count_in([at_s for at_s, outcome in ended if outcome == COMPLETED], edges)
    not_done = count_in([at_s for at_s, outcome in ended if outcome != COMPLETED], edges)
    answered = [record for record in run.records if record.token_times_s]
    first_times_s = numpy.array([record.token_times_s[0] for record in answered])
    token_times_s = numpy.concatenate([numpy.array(record.token_times_s) for record in answered] or [[]])
    token_counts = numpy.concatenate([numpy.array(record.token_counts) for record in answered] or [[]])
    ttft_p50, ttft_p99 = percentiles_in(first_times_s, numpy.array(ttfts_s(run.records)), edges)
    itl_p50, itl_p99 = percentiles_in(*gaps, edges)
    return Seconds(
        width_s=width_s,
        offered=offered.tolist(),
        completed=done.tolist(),
        not_completed=not_done.tolist(),
        in_flight=peaks_in([record.sent_at_s for record in run.records], [at_s for at_s, _ in ended], edges),
        output_tokens=count_in(token_times_s, edges, token_counts).tolist(),
        ttft_p50_s=ttft_p50,
        ttft_p99_s=ttft_p99,
        itl_p50_s=itl_p50,
        itl_p99_s=itl_p99,
    )


def count_in(times_s: Iterable[float], edges: numpy.ndarray, weights: Iterable[float] = ()) -> numpy.ndarray:
    """How many lie in each bucket `[buckets]`, int64, or the sums of their weights."""
    weights = numpy.asarray(weights, dtype=numpy.float64)
    times_s = numpy.asarray(times_s, dtype=numpy.float64)
    counts, _ = numpy.histogram(times_s, edges, weights=weights if len(weights) else None)
    return counts.astype(numpy.int64)


def peaks_in(starts_s: Sequence[float], ends_s: Sequence[float], edges: numpy.ndarray) -> list[int]:
    """How many were there at once, at most, in each bucket."""
    times_s = numpy.concatenate([starts_s, ends_s])
    order = numpy.argsort(times_s, kind="stable")
    changes = numpy.concatenate([numpy.ones(len(starts_s), int), -numpy.ones(len(ends_s), int)])
    levels = numpy.concatenate([[0], changes[order].cumsum()])
    borders = numpy.searchsorted(times_s[order], edges)
    return [int(levels[low : high + 1].max()) for low, high in pairwise(borders)]


def percentiles_in(
    times_s: numpy.ndarray, values: numpy.ndarray, edges: numpy.ndarray
) -> tuple[list[float | None], list[float | None]]:
    """p50 and p99 of the values whose times lie in each bucket; None in one with too few of them."""
    order = numpy.argsort(times_s, kind="stable")
    borders = numpy.searchsorted(times_s[order], edges)
    ordered = values[order]
    buckets = [ordered[low:high] for low, high in pairwise(borders)]
    return percentiles(buckets, 50, 1), percentiles(buckets, 99, P99_SAMPLES_MIN)


def percentiles(buckets: Sequence[numpy.ndarray], of: float, count_min: int) -> list[float | None]:
    """One percentile of each bucket; None where it has fewer values."""
    return [float(numpy.percentile(bucket, of)) if len(bucket) >= count_min else None for bucket in buckets]


def token_gaps_s(records: Sequence[RequestRecord]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Time and inter-token latency of every token after a request's first delivery, `[tokens]` each."""
    times_s, gaps_s = [numpy.empty(0)], [numpy.empty(0)]
    for record in records:
        if len(record.token_times_s) > 1:
            at_s, counts = numpy.array(record.token_times_s), numpy.array(record.token_counts)[1:]
            times_s.append(numpy.repeat(at_s[1:], counts))
            gaps_s.append(numpy.repeat(numpy.diff(at_s) / counts, counts))
    return numpy.concatenate(times_s), numpy.concatenate(gaps_s)


def ttfts_s(records: Sequence[RequestRecord]) -> list[float]:
    """Of every request that got a token."""
    return [record.ttft_s for record in records if record.ttft_s is not None]


def e2es_s(records: Sequence[RequestRecord]) -> list[float]:
    """Of every request that completed."""
    return [record.e2e_s for record in completed(records) if record.e2e_s is not None]


def completed(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Those that came to a good end."""
    return [record for record in records if record.outcome == COMPLETED]


def spread(values: Sequence[float]) -> Spread | None:
    """A distribution in six numbers; None of no samples."""
    if len(values) == 0:
        return None
    sample = numpy.asarray(values, dtype=numpy.float64)
    p50, p90, p99 = numpy.percentile(sample, [50, 90, 99]).tolist()
    return Spread(len(sample), float(sample.mean()), p50, p90, p99, float(sample.max()))


def quantiles(values: Sequence[float]) -> list[float]:
    """The values at evenly spaced shares, for a picture of their distribution."""
    if len(values) == 0:
        return []
    return numpy.quantile(numpy.asarray(values), numpy.linspace(0, 1, QUANTILES_COUNT)).tolist()


def rate(count: float, over: float) -> float:
    """One number over another, 0 over nothing."""
    return count / over if over else 0.0
