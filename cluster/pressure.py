"""What hurts a pool, and how much: pure functions of one reading."""

import math
from collections.abc import Iterator

from cluster.scaling import DECODE, EXPERTS, PREFILL, AutoscalerConfig, PoolReading, Pressure

QUEUE_SHARE = 0.5  # of the time to a first token that a prompt may spend behind others
BUSY_MAX = 0.85
PAGES_MAX = 0.8
REQUESTS_MAX = 0.9
UNEVEN_MAX = 0.5  # extra time of all layers that moving experts leaves


def pressures(reading: PoolReading, config: AutoscalerConfig) -> tuple[Pressure, ...]:
    """Every cause of which something is known; none where nothing is, and then nothing may be concluded."""
    if reading.ready_count == 0:
        return ()
    match reading.kind:
        case kind if kind == PREFILL:
            return tuple(_of_prefill(reading, config))
        case kind if kind == DECODE:
            return tuple(_of_decode(reading, config))
        case kind if kind == EXPERTS:
            return tuple(_of_experts(reading))
    return ()


def _of_prefill(reading: PoolReading, config: AutoscalerConfig) -> Iterator[Pressure]:
    if reading.tokens_per_s or not reading.tokens_waiting_count:
        work_s = reading.tokens_waiting_count / (reading.ready_count * (reading.tokens_per_s or 1.0))
        behind_s = work_s if _is_shared_by_requests(reading) else 0.0
        limit_s = QUEUE_SHARE * config.time_to_first_token_s
        words = f"{reading.tokens_waiting_count:,} prompt tokens wait, {work_s:.1f} s of work for each node"
        yield Pressure("queued prompt tokens", behind_s, limit_s, words, seconds(limit_s))
    if reading.busy_share is not None:
        yield _busy(reading.busy_share, "nodes compute")
    if reading.time_to_first_token_s is not None and _is_shared_by_requests(reading):
        limit_s = config.time_to_first_token_s
        yield _latency("time to first token", reading.time_to_first_token_s, limit_s)


def _of_decode(reading: PoolReading, config: AutoscalerConfig) -> Iterator[Pressure]:
    if reading.pages_total_count:
        share = (reading.pages_leased_count + reading.pages_awaited_count) / reading.pages_total_count
        yield Pressure(
            "pages", share, PAGES_MAX, f"{percent(share)} of pages are taken or awaited", percent(PAGES_MAX)
        )
    if reading.requests_max_count:
        share = reading.requests_count / reading.requests_max_count
        words = f"{reading.requests_count:,} requests on places for {reading.requests_max_count:,}"
        limit_words = f"{REQUESTS_MAX * reading.requests_max_count:,.0f}"
        yield Pressure("requests", share, REQUESTS_MAX, words, limit_words)
    if reading.inter_token_s is not None and _is_shared_by_requests(reading):
        yield _latency("inter-token latency", reading.inter_token_s, config.inter_token_s)


def _of_experts(reading: PoolReading) -> Iterator[Pressure]:
    """Without knowing how busy shards are, an imbalance alone is no reason: idle shards may be uneven."""
    if reading.busy_share is None:
        return
    yield _busy(reading.busy_share, "the busiest shard computes")
    if reading.slowness is not None and reading.busy_share >= BUSY_MAX / 2:
        uneven = reading.slowness - 1
        words = f"layers take {percent(uneven)} longer than on even shards, whatever moves"
        yield Pressure("imbalance", uneven, UNEVEN_MAX, words, percent(UNEVEN_MAX), is_shared=False)


def _busy(share: float, who: str) -> Pressure:
    return Pressure("busy", share, BUSY_MAX, f"{who} {percent(share)} of the time", percent(BUSY_MAX))


def _latency(cause: str, value_s: float, limit_s: float) -> Pressure:
    words = f"the {cause} of 9 in 10 is up to {seconds(value_s)}"
    return Pressure(cause, value_s, limit_s, words, seconds(limit_s), is_shared=False)


def _is_shared_by_requests(reading: PoolReading) -> bool:
    """Whether requests share nodes: where each has one to itself, more nodes make none of them faster."""
    return reading.requests_count > reading.ready_count


def percent(share: float) -> str:
    """A share for people, rounded up, so that what is above a limit looks so."""
    return f"{math.ceil(100 * share - 1e-9)} %"


def seconds(time_s: float) -> str:
    """A time for people: milliseconds below a second."""
    return f"{time_s:.1f} s" if time_s >= 1 else f"{time_s * 1000:.0f} ms"
