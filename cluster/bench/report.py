"""What a benchmark says, as plain values: the schema of its JSON. In seconds; null where nothing was."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

SCHEMA = "trivium.bench/1"


@dataclass(frozen=True)
class Spread:
    """How a quantity is distributed over its `count` samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Offer:
    """The load: counts and lengths as planned, of requests that were sent; notes on what it could not be."""

    name: str
    seed: int
    planned_count: int
    cut_count: int
    duration_s: float
    offered_per_s: float
    prompt_tokens: Spread | None
    output_tokens: Spread | None
    notes: list[str]


@dataclass(frozen=True)
class Outcomes:
    """How requests ended; the five add up to `offered`. Reasons are of all but the completed."""

    offered: int
    completed: int
    shed: int
    expired: int
    cancelled: int
    failed: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Throughput:
    """Over `elapsed_s`, to the last answer or the end of the offer; output tokens are those delivered."""

    elapsed_s: float
    completed_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    prefix_cached_share: float | None


@dataclass(frozen=True)
class Latency:
    """As the client saw it, of requests that got so far.

    `ttft_s`: when it was due to first token. `itl_s`: one token to the next; a delivery of several tokens
    shares its gap among them. `e2e_s`: when it was due to the end, of completed requests.
    """

    ttft_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    ttft_s_by_priority: dict[str, Spread]


@dataclass(frozen=True)
class ServerTiming:
    """Where the cluster says the time of completed requests went; `queued_s` is before any node."""

    queued_s: Spread | None
    prefill_s: Spread | None
    transfer_s: Spread | None
    decode_s: Spread | None
    total_s: Spread | None


@dataclass(frozen=True)
class Goodput:
    """Requests that completed with TTFT and mean ITL within bounds, over all that were offered."""

    slo_ttft_s: float
    slo_itl_s: float
    good: int
    share: float
    good_per_s: float


@dataclass(frozen=True)
class Sender:
    """How late the load generator itself was: sending after what was due, which latencies include."""

    lateness_s: Spread | None


@dataclass(frozen=True)
class Seconds:
    """The run over time: entry `i` is of the time from `i` to `i + 1` times `width_s`.

    Counts are of the whole entry; `in_flight` is the most at once; latencies are of tokens that came in it,
    with a p99 only of a hundred or more.
    """

    width_s: float
    offered: list[int]
    completed: list[int]
    not_completed: list[int]
    in_flight: list[int]
    output_tokens: list[int]
    ttft_p50_s: list[float | None]
    ttft_p99_s: list[float | None]
    itl_p50_s: list[float | None]
    itl_p99_s: list[float | None]


@dataclass(frozen=True)
class Quantiles:
    """Values at evenly spaced shares of the samples, from the smallest to the largest; empty without any."""

    ttft_s: list[float]
    itl_s: list[float]
    e2e_s: list[float]


@dataclass(frozen=True)
class Report:
    """One run against one cluster."""

    name: str
    started_at: str
    was_interrupted: bool
    offer: Offer
    outcomes: Outcomes
    throughput: Throughput
    latency: Latency
    goodput: Goodput
    server: ServerTiming
    sender: Sender
    seconds: Seconds
    quantiles: Quantiles


def to_json(reports: Sequence[Report]) -> str:
    """Reports as one JSON document."""
    values = {"schema": SCHEMA, "reports": [asdict(report) for report in reports]}
    return json.dumps(values, allow_nan=False)
