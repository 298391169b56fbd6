"""What happened to each request, in seconds since the run began; only what was sent is recorded."""

from array import array
from dataclasses import dataclass, field

from cluster.bench.workload import PlannedRequest, Workload
from cluster.gateway_messages import Timing, Usage

COMPLETED = "completed"
SHED = "shed"
EXPIRED = "expired"
CANCELLED = "cancelled"
FAILED = "failed"
OUTCOME_OF_ERROR = {"Overloaded": SHED, "DeadlinePassed": EXPIRED, "Cancelled": CANCELLED}


@dataclass(slots=True)
class RequestRecord:
    """One request as its client saw it; `token_times_s` and `token_counts` are deliveries.

    Its latencies count from when it was due: what it waited in a late client it waited all the same.
    """

    planned: PlannedRequest
    sent_at_s: float
    admitted_at_s: float | None = None
    ended_at_s: float | None = None
    token_times_s: array = field(default_factory=lambda: array("d"))
    token_counts: array = field(default_factory=lambda: array("I"))
    finish_reason: str = ""
    usage: Usage | None = None
    timing: Timing | None = None
    error_kind: str = ""
    error_reason: str = ""

    @property
    def outcome(self) -> str:
        """How it ended, in one of five words."""
        if self.error_kind:
            return OUTCOME_OF_ERROR.get(self.error_kind, FAILED)
        return COMPLETED if self.finish_reason else FAILED

    @property
    def ttft_s(self) -> float | None:
        """From when the request was due to the first token; None without one."""
        return self.token_times_s[0] - self.planned.at_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """From when the request was due to its end; None without one."""
        return self.ended_at_s - self.planned.at_s if self.ended_at_s is not None else None

    @property
    def itl_s(self) -> float | None:
        """Mean seconds from token to token; None unless there were two deliveries."""
        if len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / sum(self.token_counts[1:])


@dataclass(frozen=True)
class Run:
    """A workload and what came of it in `elapsed_s`, from the first second to the last answer."""

    workload: Workload
    records: tuple[RequestRecord, ...]
    elapsed_s: float
    was_interrupted: bool = False
