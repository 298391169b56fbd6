"""How long a call takes on the device, launches from Python left out.

Many calls are recorded in one CUDA graph and played. Between two of them 256 MiB are read, so that each finds
nothing of its own in the L2 cache; the same graph without the calls is played alternately and its time taken
off. Reading leaves the cache clean, where writing would leave it full of lines that the call then had to
write back. What cannot be recorded is called from Python, with an event before and after, and marked so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

Run = Callable[[], object]

FLUSHED_BYTES = 1 << 28
FLUSH_US = 75.0  # about, on an H200
RECORDED_US = 2000.0
LAUNCHES_MAX = 40
PLAYS_MIN, PLAYS_MAX = 4, 20


@dataclass(frozen=True, slots=True)
class Measured:
    """Time of one call, and whether it was recorded rather than called from Python."""

    us: float
    is_recorded: bool = True


@dataclass(frozen=True, slots=True)
class Waits:
    """A call that is known to wait for the device, which cannot be recorded."""

    run: Run

    def __call__(self) -> object:
        """Call it."""
        return self.run()


class DeviceTimer:
    """Medians over calls on the GPU, cold unless `is_warm`."""

    def __init__(self, is_warm: bool = False, budget_us: float = 120e3):
        self._is_warm = is_warm
        self._budget_us = budget_us
        self._flushed = torch.ones(FLUSHED_BYTES // 4, device="cuda")
        self._sum = torch.empty((), device="cuda")
        self._flushes: dict[int, torch.cuda.CUDAGraph] = {}
        self._unfinished: list[torch.cuda.CUDAGraph] = []

    def measure(self, run: Run) -> Measured:
        """Time of `run`, which is called a few times first; raises what it raises."""
        about_us = self._time_calls(run, 2)
        launches = max(1, min(LAUNCHES_MAX, int(RECORDED_US / about_us)))
        each_us = launches * (about_us + (0 if self._is_warm else 2 * FLUSH_US))
        plays = max(PLAYS_MIN, min(PLAYS_MAX, int(self._budget_us / each_us)))
        if isinstance(run, Waits):
            return Measured(self._time_calls(run, plays), is_recorded=False)
        try:
            graph = self._recorded(run, launches)
        except Exception:  # a peer may wait for the device, allocate by itself, or raise its own kind
            torch.cuda.synchronize()
            return Measured(self._time_calls(run, plays), is_recorded=False)
        return Measured(self._time_plays(graph, launches, plays))

    def _recorded(self, run: Run, launches: int) -> torch.cuda.CUDAGraph:
        """A graph of calls, each after a flush; or of flushes alone."""
        graph = torch.cuda.CUDAGraph()
        self._unfinished.append(graph)  # the allocator may go on asking one whose recording failed
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                self._flush()
                run()
        return self._unfinished.pop()

    def _flush(self) -> None:
        if not self._is_warm:
            torch.sum(self._flushed, dim=0, out=self._sum)

    def _flush_graph(self, launches: int) -> torch.cuda.CUDAGraph:
        if launches not in self._flushes:
            self._flushes[launches] = self._recorded(lambda: None, launches)
        return self._flushes[launches]

    def _time_plays(self, graph: torch.cuda.CUDAGraph, launches: int, plays: int) -> float:
        both = [graph] if self._is_warm else [graph, self._flush_graph(launches)]
        for _ in range(2):
            for one in both:
                one.replay()
        events = [[timed(one.replay) for one in both] for _ in range(plays)]
        torch.cuda.synchronize()
        medians = [median(elapsed_us(pair) for pair in column) for column in zip(*events, strict=True)]
        return max(medians[0] - sum(medians[1:]), 1e-3) / launches

    def _time_calls(self, run: Run, calls: int) -> float:
        """Median of calls from Python, after one that loads what they need."""
        run()
        torch.cuda.synchronize()
        events = []
        for _ in range(calls):
            self._flush()
            events.append(timed(run))
        torch.cuda.synchronize()
        return max(median(elapsed_us(pair) for pair in events), 1e-3)


class HostTimer:
    """One call by the host's clock: to see that everything runs where there is no GPU."""

    def measure(self, run: Run) -> Measured:
        """Time of one call."""
        begin = time.perf_counter()
        run()
        return Measured(1e6 * (time.perf_counter() - begin), is_recorded=False)


def timed(run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events before and after a call."""
    pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    pair[0].record()
    run()
    pair[1].record()
    return pair


def elapsed_us(pair: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
    """Between two events that have passed."""
    return 1e3 * pair[0].elapsed_time(pair[1])
