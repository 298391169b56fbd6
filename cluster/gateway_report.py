"""What a gateway tells of its requests: counts since it began, how long things took, and who waits."""

from collections import Counter
from dataclasses import dataclass, field, replace

from cluster.distribution import NOTHING, Distribution, Tally
from cluster.events import Phases
from cluster.route import Phase
from cluster.router import Router

REASONS_MAX = 16  # different ones that are counted apart; a label in a metric must not grow without end
OTHER = "other"


@dataclass(frozen=True)
class GatewayReport:
    """Numbers that a gateway returns about itself; counts and distributions since its start."""

    requests_running_count: int = 0
    """On nodes now."""
    requests_waiting_count: int = 0
    """Without nodes now."""
    prompt_tokens_waiting_count: int = 0
    """Tokens to be prefilled for the requests without nodes."""
    pages_waiting_count: int = 0
    """Pages that the requests without nodes want on decode nodes, growth included."""
    admitted_count: int = 0
    shed_count: int = 0
    """Not admitted because too many wait."""
    cancelled_count: int = 0
    """Left by their client before their end."""
    retried_count: int = 0
    """Further attempts after a node failed or was lost."""
    migrated_count: int = 0
    """Those of them that go on behind tokens which the client has already."""
    finished_counts: dict[str, int] = field(default_factory=dict)
    """By reason."""
    failed_counts: dict[str, int] = field(default_factory=dict)
    """By reason."""
    prompt_tokens_count: int = 0
    cached_tokens_count: int = 0
    """Prompt tokens that were in pages already; known once a request has finished."""
    output_tokens_count: int = 0
    time_to_first_token_s: Distribution = NOTHING
    """From the call, to the first token."""
    inter_token_s: Distribution = NOTHING
    """A chunk of n tokens after a gap counts as n tokens, each after an nth of it."""
    end_to_end_s: Distribution = NOTHING
    """From admission to the finish, of requests that finished."""
    queued_s: Distribution = NOTHING
    prefill_s: Distribution = NOTHING
    transfer_s: Distribution = NOTHING
    """What was left to transfer once the prompt was computed; of requests that were handed over."""

    @property
    def requests_count(self) -> int:
        """Requests under way, on nodes or waiting for them."""
        return self.requests_running_count + self.requests_waiting_count

    def without_times(self) -> "GatewayReport":
        """The counts alone, which are short."""
        return replace(self, **dict.fromkeys(TIMES, NOTHING))


TIMES = tuple(name for name, one in GatewayReport.__dataclass_fields__.items() if one.default is NOTHING)


@dataclass(slots=True)
class _Clocks:
    admitted_s: float
    delivered_s: float = 0.0
    """Of the last chunk; 0 before the first."""


class GatewayRecorder:
    """Hears from the desk what becomes of each request; all in one event loop, time as an argument."""

    def __init__(self) -> None:
        self._clocks: dict[str, _Clocks] = {}
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._time_to_first_token = Tally()
        self._inter_token = Tally()
        self._end_to_end = Tally()
        self._queued = Tally()
        self._prefill = Tally()
        self._transfer = Tally()

    def admitted(self, request_id: str, prompt_tokens_count: int, now_s: float) -> None:
        """A request was taken."""
        self._clocks[request_id] = _Clocks(now_s)
        self._counts["admitted"] += 1
        self._counts["prompt_tokens"] += prompt_tokens_count

    def shed(self) -> None:
        """A request was not taken, since too many wait."""
        self._counts["shed"] += 1

    def delivered(self, request_id: str, tokens_count: int, now_s: float) -> None:
        """A request's client was given its next tokens."""
        clocks = self._clocks.get(request_id)
        if clocks is None:
            return
        self._counts["output_tokens"] += tokens_count
        if clocks.delivered_s:
            self._inter_token.observe((now_s - clocks.delivered_s) / tokens_count, tokens_count)
        else:
            self._time_to_first_token.observe(now_s - clocks.admitted_s)
        clocks.delivered_s = now_s

    def finished(self, request_id: str, reason: str, cached_tokens_count: int, phases: Phases) -> None:
        """A request has come to its end."""
        if self._clocks.pop(request_id, None) is None:
            return
        _count_reason(self._finished, reason)
        self._counts["cached_tokens"] += cached_tokens_count
        self._end_to_end.observe(phases.total_s)
        self._queued.observe(phases.queued_s)
        self._prefill.observe(phases.prefill_s)
        if phases.transfer_s:
            self._transfer.observe(phases.transfer_s)

    def failed(self, request_id: str, reason: str) -> None:
        """A request was given up."""
        if self._clocks.pop(request_id, None) is not None:
            _count_reason(self._failed, reason)

    def left(self, request_id: str) -> None:
        """Nobody waits for a request any more; if it had not ended, that was its client's will."""
        if self._clocks.pop(request_id, None) is not None:
            self._counts["cancelled"] += 1

    def report(self, router: Router) -> GatewayReport:
        """All that was heard until now, and who waits or runs."""
        waiting = [route for route in router.routes.values() if route.phase is Phase.WAITING]
        return GatewayReport(
            requests_running_count=len(router.routes) - len(waiting),
            requests_waiting_count=len(waiting),
            prompt_tokens_waiting_count=sum(route.tokens_count for route in waiting),
            pages_waiting_count=sum(route.pages_wanted_count for route in waiting),
            admitted_count=self._counts["admitted"],
            shed_count=self._counts["shed"],
            cancelled_count=self._counts["cancelled"],
            retried_count=router.retries_count,
            migrated_count=router.migrations_count,
            finished_counts=dict(self._finished),
            failed_counts=dict(self._failed),
            prompt_tokens_count=self._counts["prompt_tokens"],
            cached_tokens_count=self._counts["cached_tokens"],
            output_tokens_count=self._counts["output_tokens"],
            time_to_first_token_s=self._time_to_first_token.distribution(),
            inter_token_s=self._inter_token.distribution(),
            end_to_end_s=self._end_to_end.distribution(),
            queued_s=self._queued.distribution(),
            prefill_s=self._prefill.distribution(),
            transfer_s=self._transfer.distribution(),
        )


def _count_reason(counts: Counter[str], reason: str) -> None:
    is_known = reason in counts or len(counts) < REASONS_MAX
    counts[reason if is_known else OTHER] += 1
