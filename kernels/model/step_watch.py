"""Tells a node that gets nowhere any more from one that was only given a poisonous request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

FAILURES_MAX = 5
FAILING_S = 10.0


class StepsFail(RuntimeError):
    """Steps fail whatever is in them, or never end: it is the node's fault, which a new process may mend."""


class StepWatch:
    """One thread steps, any may ask."""

    def __init__(self, step_s_max: float, clock: Callable[[], float]):
        self._step_s_max = step_s_max
        self._clock = clock
        self._begun_s: float | None = None
        self._is_warm = False
        self._failed: set[object] = set()
        self._failing_since_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what is done meanwhile."""
        self._begun_s = self._clock()
        try:
            yield
        finally:
            self._begun_s = None

    @property
    def is_stuck(self) -> bool:
        """Whether a step lasts longer than any may; not the first good one, in which kernels are compiled."""
        begun_s = self._begun_s
        return self._is_warm and begun_s is not None and self._clock() > begun_s + self._step_s_max

    def succeeded(self) -> None:
        """Note a good step: whatever failed before was not the node's fault."""
        self._is_warm = True
        self._failed.clear()

    def failed(self, request_id: str | None = None) -> None:
        """Note a step that failed unforeseen, or had no numbers; raises StepsFail once it is the node's.

        A step of one request alone names it, for the same one may be sent again and again.
        """
        now_s = self._clock()
        if not self._failed:
            self._failing_since_s = now_s
        self._failed.add(object() if request_id is None else request_id)
        if len(self._failed) > FAILURES_MAX and now_s > self._failing_since_s + FAILING_S:
            raise StepsFail(f"{len(self._failed)} steps failed and none was good for {FAILING_S} s")
