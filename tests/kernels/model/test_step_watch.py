"""When failing steps, or one without end, are the node's fault."""

import pytest

from kernels.model.step_watch import FAILING_S, FAILURES_MAX, StepsFail, StepWatch


class Clock:
    """Time as a test has it."""

    now_s = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """Its own clock for each test."""
    return Clock()


@pytest.fixture
def watch(clock) -> StepWatch:
    """Steps of at most a minute."""
    return StepWatch(60.0, clock)


def test_steps_that_fail_for_long_are_the_nodes_fault(watch, clock):
    for number in range(3 * FAILURES_MAX):
        watch.failed(f"r{number}")
    clock.now_s += FAILING_S + 1
    with pytest.raises(StepsFail, match="16 steps failed"):
        watch.failed()


def test_few_failures_are_nobodys_however_long_apart(watch, clock):
    for _ in range(FAILURES_MAX):
        watch.failed()
        clock.now_s += FAILING_S


def test_one_request_that_comes_again_and_again_kills_no_node(watch, clock):
    for _ in range(10 * FAILURES_MAX):
        watch.failed("poison")
        clock.now_s += FAILING_S


def test_a_good_step_clears_the_node(watch, clock):
    for _ in range(4 * FAILURES_MAX):
        watch.failed()
        clock.now_s += FAILING_S / 4
        if len(watch._failed) == FAILURES_MAX:
            watch.succeeded()


def test_a_step_without_end_is_seen_once_one_was_good(watch, clock):
    with watch.step():
        clock.now_s += 1000.0
        assert not watch.is_stuck, "kernels are compiled in the first"
        watch.succeeded()
    assert not watch.is_stuck
    with watch.step():
        clock.now_s += 60.0
        assert not watch.is_stuck
        clock.now_s += 1.0
        assert watch.is_stuck
    clock.now_s += 1000.0
    assert not watch.is_stuck, "between steps nothing is awaited"
