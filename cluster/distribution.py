"""How often values fell between fixed bounds: counted by one, told to others, subtracted to see a while."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

_STEPS = (1, 1.5, 2, 3, 5, 7)
SECONDS = (0.0005, 0.0007, *(round(step * 10.0**tens, 9) for tens in range(-3, 3) for step in _STEPS))
"""Bounds for what a client waits for: close enough together that a quantile is true to about a tenth."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values since somebody began to count; `counts[i]` of them above `bounds[i - 1]`, up to `bounds[i]`."""

    bounds: tuple[float, ...] = SECONDS
    """Ascending; what is above the last has a count of its own, so there is one count more than bounds."""
    counts: tuple[int, ...] = (0,) * (len(SECONDS) + 1)
    total: float = 0.0
    """Sum of the values."""

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Their mean; None of none."""
        return self.total / self.count if self.count else None

    @property
    def counts_up_to(self) -> tuple[int, ...]:
        """How many values lie at or below each bound, and at last all of them."""
        return tuple(accumulate(self.counts))

    def since(self, before: "Distribution | None") -> "Distribution":
        """The values that came after an earlier state; all, where who counts has begun anew meanwhile."""
        if before is None or before.bounds != self.bounds:
            return self
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        if min(counts) < 0:
            return self
        return Distribution(self.bounds, counts, max(self.total - before.total, 0.0))

    def quantile(self, share: float) -> float | None:
        """A value that `share` (0 to 1) of the values do not exceed, as if even between bounds; None of none.

        Of values above the last bound no more is known than that: they count as the last bound.
        """
        if not self.count:
            return None
        wanted, below = share * self.count, 0
        edges = (min(0.0, self.bounds[0]), *self.bounds)
        for (low, high), count in zip(pairwise(edges), self.counts, strict=False):
            if count and below + count >= wanted:
                return low + (high - low) * (wanted - below) / count
            below += count
        return self.bounds[-1]


class Tally:
    """Counts values into a distribution; for one thread, and for as many values as there are tokens."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, or `count` equal ones."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def distribution(self) -> Distribution:
        """What was counted until now."""
        return Distribution(self._bounds, tuple(self._counts), self._total)


NOTHING = Distribution()


def merged(distributions: Iterable[Distribution]) -> Distribution:
    """The values of several together; raises ValueError where bounds differ."""
    distributions = list(distributions)
    if not distributions:
        return NOTHING
    bounds = {one.bounds for one in distributions}
    if len(bounds) > 1:
        raise ValueError("distributions over different bounds cannot be merged")
    counts = tuple(map(sum, zip(*(one.counts for one in distributions), strict=True)))
    return Distribution(bounds.pop(), counts, sum(one.total for one in distributions))
