"""Busy time is that of computing, by the clock of who computes."""

import time

import torch

from experts.busy import BusyTime


class Event:
    """A GPU's event, on a clock that a test moves."""

    now_ms = 0.0
    passed_ms = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.at_ms = 0.0

    def record(self) -> None:
        """Mark the moment at which the GPU will come here."""
        self.at_ms = Event.now_ms

    def query(self) -> bool:
        """Whether it has."""
        return self.at_ms <= Event.passed_ms

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds until another."""
        return end.at_ms - self.at_ms


def test_a_cpu_is_busy_as_long_as_its_thread():
    busy = BusyTime(torch.device("cpu"))
    with busy.measured():
        time.sleep(0.02)
    assert 0.02 <= busy.seconds < 1


def test_a_gpu_is_busy_by_its_own_clock_and_nobody_waits_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    busy = BusyTime(torch.device("cuda"))
    for end_ms in (5.0, 12.0):
        with busy.measured():
            Event.now_ms = end_ms
    assert busy.seconds == 0.0, "it has computed nothing yet"
    Event.passed_ms = 20.0
    with busy.measured():
        pass
    assert abs(busy.seconds - 0.012) < 1e-9
