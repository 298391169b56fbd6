"""Hand-made records of requests."""

from array import array

from cluster.bench.record import RequestRecord, Run
from cluster.bench.workload import PlannedRequest, Workload
from cluster.gateway_messages import Timing, Usage


def planned(at_s: float = 0.0, prompt: int = 10, output: int = 4, priority: int = 0) -> PlannedRequest:
    """A request."""
    return PlannedRequest(at_s, (), prompt, output, seed=1, priority=priority)


def finished(
    request: PlannedRequest, sent_at_s: float, deliveries: list[tuple[float, int]], cached: int = 0
) -> RequestRecord:
    """A request that completed with its last token."""
    times_s, counts = zip(*deliveries, strict=True)
    return RequestRecord(
        planned=request,
        sent_at_s=sent_at_s,
        admitted_at_s=sent_at_s,
        ended_at_s=times_s[-1],
        token_times_s=array("d", times_s),
        token_counts=array("I", counts),
        finish_reason="length",
        usage=Usage(request.prompt_tokens_count, cached, sum(counts)),
        timing=Timing(0.1, 0.2, 0.0, 0.3, times_s[-1] - sent_at_s),
    )


def refused(request: PlannedRequest, at_s: float, kind: str, reason: str) -> RequestRecord:
    """A request that got an error and no token."""
    return RequestRecord(request, at_s, ended_at_s=at_s + 0.01, error_kind=kind, error_reason=reason)


def run_of(*records: RequestRecord, duration_s: float = 10.0, elapsed_s: float = 10.0, **more: bool) -> Run:
    """A run in which all that was planned was sent."""
    requests = tuple(record.planned for record in records)
    return Run(Workload("hand-made", requests, duration_s, 8, 0), records, elapsed_s, **more)


def small_run() -> Run:
    """Two good requests, one slow, one with slow tokens, and one of each other end."""
    return run_of(
        finished(planned(0.0), 0.001, [(0.501, 1), (0.601, 1), (0.801, 2)], cached=5),
        finished(planned(1.0, priority=5), 1.0, [(1.2, 4)]),
        finished(planned(2.0), 2.0, [(4.0, 1), (4.1, 3)]),
        finished(planned(3.0), 3.0, [(3.1, 1), (4.6, 3)]),
        refused(planned(4.0), 4.0, "Overloaded", "QUEUE_FULL"),
        refused(planned(5.0), 5.0, "DeadlinePassed", "DEADLINE_EXCEEDED"),
        refused(planned(6.0), 6.0, "Cancelled", "CANCELLED"),
        refused(planned(7.0), 7.0, "NodeUnavailable", "NO_NODE"),
    )
