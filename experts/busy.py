"""How long a device has computed, found out without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BusyTime:
    """Adds up spans of computing: by the clock on a CPU, by a GPU's own events once they have passed."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._is_gpu = device.type == "cuda"
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Meanwhile the calling thread computes, or tells its GPU what to compute."""
        if not self._is_gpu:
            begin_s = time.monotonic()
            yield
            self.seconds += time.monotonic() - begin_s
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._open.append((begin, end))
        self._settle()

    def _settle(self) -> None:
        while self._open and self._open[0][1].query():
            begin, end = self._open.popleft()
            self.seconds += begin.elapsed_time(end) / 1000
