"""What is measured of pools, what is decided about them, and what people are shown: plain dataclasses.

A pool is a deployment: its actors belong to it for good, but a prefill or decode node may be lent to the
other pool. So `target_count`, which Ray Serve aims at, counts a pool's own actors, wherever they serve; the
nodes that serve as a kind are the target less those that are lent, with those that are borrowed.
"""

from dataclasses import dataclass

PREFILL, DECODE, EXPERTS, GATEWAY = "prefill", "decode", "experts", "gateway"
KINDS = (GATEWAY, PREFILL, DECODE, EXPERTS)
PARTNERS = {PREFILL: DECODE, DECODE: PREFILL}
"""Kinds whose processes can serve as each other."""


@dataclass(frozen=True, slots=True)
class PoolReading:
    """What was measured of one pool at `read_s`; None is not known, or there was no request."""

    kind: str
    read_s: float
    target_count: int
    ready_count: int
    """Nodes that serve as this kind now, borrowed ones too."""
    starting_count: int = 0
    draining_count: int = 0
    lent_count: int = 0
    """Of this pool's actors, those that serve as the other kind or are on their way to it."""
    is_complete: bool = True
    """Whether all who should have told their numbers: else nothing may be concluded from what is missing."""
    requests_count: int = 0
    """On nodes of this kind, running or waiting; for decode also those that wait at gateways."""
    requests_max_count: int = 0
    """That the nodes which are ready can run at a time; 0 where it is not known."""
    tokens_waiting_count: int = 0
    """Prompt tokens still to be computed."""
    tokens_per_s: float | None = None
    """Prompt tokens that one node computes while it is busy."""
    busy_share: float | None = None
    """Of the time of late: the nodes' mean; for experts that of the busiest shard."""
    time_to_first_token_s: float | None = None
    """Which 9 in 10 requests of late did not exceed; so also for `inter_token_s`."""
    inter_token_s: float | None = None
    pages_total_count: int = 0
    pages_leased_count: int = 0
    """With all that their requests may ever need."""
    pages_awaited_count: int = 0
    """Wanted by requests at gateways."""
    slowness: float | None = None
    """Of experts: time of all layers over that of even shards, as moving experts leaves it."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """One cause: what was measured, and the limit above which it hurts."""

    cause: str
    value: float
    limit: float
    words: str
    """What was measured, for people."""
    limit_words: str
    is_shared: bool = True
    """Whether it goes down in proportion as nodes come; else more of them help, but nobody knows how much."""

    @property
    def level(self) -> float:
        """The value as a share of its limit; above 1 it hurts."""
        return self.value / self.limit

    def level_with(self, count: int, ready_count: int) -> float:
        """The level that `count` nodes would have, measured with `ready_count`."""
        return self.level * ready_count / count if self.is_shared else self.level


@dataclass(frozen=True, slots=True)
class Hold:
    """A count that a person has set; it stays until it is released."""

    kind: str
    count: int
    by: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A pool's count was changed, held or released, and why; counts are of actors that Serve aims at."""

    when_s: float
    kind: str
    from_count: int
    to_count: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScalePool:
    """Have Serve aim at `count` actors of a pool."""

    kind: str
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Have one node of a kind serve as the other, one that goes home first."""

    from_kind: str
    to_kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class PoolState:
    """One pool as people are shown it."""

    kind: str
    target_count: int
    ready_count: int
    starting_count: int
    draining_count: int
    lent_count: int
    borrowed_count: int
    count_min: int
    count_max: int
    hold: Hold | None
    pressures: tuple[Pressure, ...]
    last_reason: str
    outlook: str
    """What is awaited before the next change, or why there is none."""
    grown_count: int = 0
    """Decisions since the coordinator began; so also `shrunk_count`."""
    shrunk_count: int = 0


@dataclass(frozen=True, slots=True)
class PoolsReport:
    """All pools, and the decisions of late, newest first; times are on the clock that shows `now_s`."""

    now_s: float
    is_enabled: bool
    pools: tuple[PoolState, ...] = ()
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many actors a pool has at the start, and between which counts the autoscaler may move it."""

    kind: str
    count: int
    count_min: int
    count_max: int


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    """When pools grow and shrink; of the pools that are shown, gateways are for people alone to set."""

    pools: tuple[PoolLimits, ...]
    is_enabled: bool = True
    time_to_first_token_s: float = 2.0
    inter_token_s: float = 0.1
    grow_pause_s: float = 10.0
    shrink_pause_s: float = 60.0
