"""What the autoscaler keeps of one pool between two looks at it."""

import math
from dataclasses import dataclass, field

from cluster.scaling import Hold, PoolLimits, PoolReading, Pressure

STALE_S = 5.0
OBEYED_S = 30.0  # in which Serve shows what it was asked for; else the call was lost
HELPED = 0.9  # of what a growth was for may be left at most, for it to have helped


@dataclass(slots=True, eq=False)
class ScaledPool:
    """What the autoscaler keeps of one pool."""

    limits: PoolLimits
    partner: "ScaledPool | None" = field(default=None, repr=False)
    """The pool whose nodes can serve as this one's, if there is one."""
    reading: PoolReading | None = None
    seen_s: float = -math.inf
    """When the reading came; nothing is done about one twice."""
    pressures: tuple[Pressure, ...] = ()
    target_count: int | None = None
    """That Serve was last seen to aim at."""
    asked_count: int | None = None
    """That Serve was asked for and has not shown yet."""
    asked_s: float = -math.inf
    overtaken_counts: set[int] = field(default_factory=set)
    """Asked for before that and not seen either: Serve may show them on its way."""
    loans_asked: tuple[int, int] | None = None
    """Nodes lent and borrowed when one was asked to change its role, until that shows."""
    grown_s: float = -math.inf
    level_asked: float = 1.0
    shrunk_s: float = -math.inf
    roomy_since_s: float | None = None
    changing_since_s: float | None = None
    regret: int = 1
    grown_for: Pressure | None = None
    """What the last growth was for, where it is unknown how much more nodes help against it."""
    futile_causes: set[str] = field(default_factory=set)
    """Such causes that did not go down when nodes came: something else is to be mended."""
    hold: Hold | None = None
    reason: str = ""
    grown_count: int = 0
    shrunk_count: int = 0

    @property
    def kind(self) -> str:
        """Whose pool it is."""
        return self.limits.kind

    @property
    def aim_count(self) -> int:
        """Actors that Serve aims at, or will as soon as it has obeyed."""
        known = (self.asked_count, self.target_count, self.reading.target_count if self.reading else 0)
        return next(count for count in known if count is not None)

    @property
    def is_awaited(self) -> bool:
        """Whether something was asked for that does not show yet."""
        return self.asked_count is not None or self.loans_asked is not None

    @property
    def lent_count(self) -> int:
        """Of its actors, those that serve the partner."""
        return self.reading.lent_count if self.reading is not None else 0

    @property
    def borrowed_count(self) -> int:
        """Of the partner's actors, those that serve here."""
        return self.partner.lent_count if self.partner is not None else 0

    @property
    def nodes_count(self) -> int:
        """Nodes that serve as this kind once all that was asked for has come to be."""
        return self.aim_count - self.lent_count + self.borrowed_count

    @property
    def is_changing(self) -> bool:
        """Whether nodes start or drain, as it was read."""
        reading = self.reading
        is_moving = reading.starting_count > 0 or reading.draining_count > 0
        return is_moving or reading.ready_count != self.nodes_count

    def is_moved_by_others(self, count: int) -> bool:
        """Whether Serve aims at a count that it did not before and was not asked for."""
        ours = {self.target_count, self.asked_count, *self.overtaken_counts}
        return self.target_count is not None and count not in ours

    def is_heard(self, now_s: float) -> bool:
        """Whether there is a reading, and a fresh one."""
        return self.reading is not None and now_s - self.reading.read_s <= STALE_S

    def ask(self, count: int, now_s: float) -> None:
        """Note what Serve is asked for."""
        if self.asked_count is not None:
            self.overtaken_counts.add(self.asked_count)
        self.asked_count, self.asked_s = count, now_s

    def notice_loans(self, now_s: float) -> None:
        """A change of role that was asked for shows, or never will."""
        is_done = self.loans_asked != (self.lent_count, self.borrowed_count)
        if is_done or now_s - self.asked_s > OBEYED_S:
            self.loans_asked = None

    @property
    def causes(self) -> tuple[Pressure, ...]:
        """What more nodes may help against."""
        return tuple(one for one in self.pressures if one.cause not in self.futile_causes)

    @property
    def causes_to_grow(self) -> tuple[Pressure, ...]:
        """Those without one for which nodes are on trial: whether they help is seen first."""
        on_trial = self.grown_for.cause if self.grown_for is not None else ""
        return tuple(one for one in self.causes if one.cause != on_trial)

    def learn_from_growth(self, is_over: bool) -> None:
        """Note whether the nodes that came have helped, once all are there; what has ended is forgotten."""
        levels = {one.cause: one.level for one in self.pressures}
        self.futile_causes = {cause for cause in self.futile_causes if levels.get(cause, 0.0) > 1}
        if self.grown_for is not None and is_over:
            if levels.get(self.grown_for.cause, 0.0) > HELPED * self.grown_for.level:
                self.futile_causes.add(self.grown_for.cause)
            self.grown_for = None

    def ask_no_more(self) -> None:
        """Serve has shown what it was asked for, or somebody else was quicker, or it never will."""
        self.asked_count = None
        self.overtaken_counts.clear()
