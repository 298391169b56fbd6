"""The timer's arithmetic on a device whose clock is known; and tables of what was timed."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.gpu import timing
from benchmarks.gpu.report import failures_of, line_of, machine, show
from benchmarks.gpu.timing import DeviceTimer, HostTimer, Measured, Waits

FLUSH_US, CALL_US, LAUNCH_US = 70.0, 5.0, 9.0


class Device:
    """A device that computes at once and knows how long it took; its calls from Python cost a launch."""

    def __init__(self):
        self.now_us = 0.0
        self.tape: list[float] | None = None

    def spend(self, us: float) -> None:
        """Compute, or record that."""
        if self.tape is None:
            self.now_us += us
        else:
            self.tape.append(us)

    def call(self) -> None:
        """What is timed."""
        self.spend(CALL_US if self.tape is not None else CALL_US + LAUNCH_US)


@pytest.fixture
def device(monkeypatch) -> Device:
    """In place of torch's GPU."""
    device = Device()

    class Event:
        """A moment."""

        def __init__(self, enable_timing):
            self.at_us = None

        def record(self):
            """Now."""
            self.at_us = device.now_us

        def elapsed_time(self, other):
            """Milliseconds."""
            return (other.at_us - self.at_us) / 1e3

    class CUDAGraph:
        """What was recorded."""

        def __init__(self):
            self.tape = []

        def replay(self):
            """All of it."""
            device.now_us += sum(self.tape)

    @contextmanager
    def graph(recorded):
        device.tape = recorded.tape
        try:
            yield
        finally:
            device.tape = None

    cuda = SimpleNamespace(Event=Event, CUDAGraph=CUDAGraph, graph=graph, synchronize=lambda: None)
    stub = SimpleNamespace(
        cuda=cuda,
        ones=lambda *_, **__: None,
        empty=lambda *_, **__: None,
        sum=lambda *_, **__: device.spend(FLUSH_US),
    )
    monkeypatch.setattr(timing, "torch", stub)
    return device


def test_neither_flushes_nor_launches_are_counted(device):
    measured = DeviceTimer().measure(device.call)
    assert measured.us == pytest.approx(CALL_US)
    assert measured.is_recorded


def test_a_warm_call_follows_another_at_once(device):
    assert DeviceTimer(is_warm=True).measure(device.call).us == pytest.approx(CALL_US)


def test_what_cannot_be_recorded_is_called_from_python_and_marked(device):
    def waits():
        if device.tape is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        device.call()

    measured = DeviceTimer().measure(waits)
    assert measured.us == pytest.approx(CALL_US + LAUNCH_US)
    assert not measured.is_recorded
    assert DeviceTimer().measure(device.call).is_recorded


def test_what_is_known_to_wait_is_never_recorded(device):
    def waits():
        assert device.tape is None
        device.call()

    assert DeviceTimer().measure(Waits(waits)) == Measured(CALL_US + LAUNCH_US, is_recorded=False)


def test_a_long_call_is_made_few_times(device):
    calls = []

    def long():
        calls.append(1)
        device.spend(50e3)

    assert DeviceTimer().measure(long).us == pytest.approx(50e3)
    assert len(calls) == 1 + 2 + 1


def test_without_a_gpu_a_call_is_timed_by_the_host():
    assert HostTimer().measure(lambda: None).us > 0


RESULT = {"operation": "gate", "sizes": "1 token", "us": 3.0, "tflop/s": 0.0, "gb/s": 4.0, "floor us": 1.0}
RESULT |= {"limit": "memory", "share": 0.33, "called": "from Python"}


def test_tables_hold_times_peers_and_failures():
    peers = {
        "slow": {"us": 6.0, "ours is faster by": 2.0, "called": "from Python"},
        "quick": {"us": 1.5, "ours is faster by": 0.5},
        "gone": {"failed": "ImportError: no"},
    }
    results = [RESULT | {"peers": peers}, {"operation": "mix", "sizes": "2 tokens", "failed": "wrong"}]
    console = Console(record=True, width=150)
    show(results, console)
    text = console.export_text()
    for part in ("gate", "3.0*", "33%", "quick 1.5 (0.50); slow 6.0* (2.00)", "mix", "wrong"):
        assert part in text
    assert failures_of(results) == {"gate, gone: ImportError: no": 1}
    assert line_of(results[0]) == "gate 1 token: 3.0 µs, 33% of the limit"
    assert line_of(results[1]) == "mix 2 tokens: wrong"


def test_the_machine_is_described_with_and_without_a_gpu():
    assert {"python", "torch", "triton", "cores"} <= machine().keys()
