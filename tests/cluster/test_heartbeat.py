"""Heartbeats go on, whatever the coordinator does and however long following a view takes."""

import asyncio
from collections.abc import Callable

import pytest

from cluster import heartbeat as heartbeat_module
from cluster.heartbeat import Heartbeat, member_name
from cluster.view import Member, View
from tests.cluster.served import until


class Method:
    """A method of an actor, called as Ray calls it."""

    def __init__(self, answer: Callable):
        self.remote = answer


class Coordinator:
    """Answers with a view, or with what a test plants."""

    def __init__(self) -> None:
        self.heard: list[Member] = []
        self.left: list[str] = []
        self.error: BaseException | None = None
        self.pace_s = 0.001
        self.heartbeat = Method(self._hear)
        self.leave = Method(self._leave)

    async def _hear(self, member: Member) -> View:
        self.heard.append(member)
        if self.error is not None:
            raise self.error
        return View((member,), pace_s=self.pace_s)

    async def _leave(self, name: str) -> None:
        self.left.append(name)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """No waiting between heartbeats."""
    monkeypatch.setattr(heartbeat_module, "BEAT_S", 0.001)


def describe() -> Member:
    """The actor of these tests."""
    return Member("m", "decode", "")


def test_beats_views_and_leaving():
    async def run() -> None:
        coordinator, views = Coordinator(), []

        async def on_view(view: View) -> None:
            views.append(view)

        heartbeat = Heartbeat(coordinator, describe, on_view)
        heartbeat.start()
        await until(lambda: len(views) > 2)
        await heartbeat.stop()
        assert heartbeat.view.members == (describe(),)
        assert coordinator.left == ["m"]

    asyncio.run(run())


def test_the_coordinator_sets_the_pace():
    async def run() -> None:
        coordinator = Coordinator()
        coordinator.pace_s = 30.0
        heartbeat = Heartbeat(coordinator, describe, on_view=nothing)
        heartbeat.start()
        await until(lambda: coordinator.heard)
        await asyncio.sleep(0.05)
        assert len(coordinator.heard) == 1
        await heartbeat.stop()

    asyncio.run(run())


async def nothing(_: View) -> None:
    """What a member does that only looks."""


def test_slow_following_stops_no_heartbeat_and_runs_once_at_a_time():
    async def run() -> None:
        coordinator, running = Coordinator(), []

        async def on_view(_: View) -> None:
            running.append(1)
            await asyncio.Event().wait()

        heartbeat = Heartbeat(coordinator, describe, on_view)
        heartbeat.start()
        await until(lambda: len(coordinator.heard) > 10)
        await heartbeat.announce()
        assert running == [1]
        await heartbeat.stop()

    asyncio.run(run())


def test_a_late_coordinator_hears_all_the_same_that_one_left():
    async def run() -> None:
        coordinator, is_awake = Coordinator(), asyncio.Event()

        async def leave_late(name: str) -> None:
            await is_awake.wait()
            coordinator.left.append(name)

        heartbeat = Heartbeat(coordinator, describe, on_view=lambda view: None)
        await heartbeat.announce()
        coordinator.heartbeat = Method(lambda member: asyncio.Event().wait())
        coordinator.leave = Method(leave_late)
        await heartbeat.announce(timeout_s=0.01)
        assert not heartbeat.is_answered
        await heartbeat.stop()
        assert coordinator.left == []
        is_awake.set()
        await until(lambda: coordinator.left == ["m"])

    asyncio.run(run())


@pytest.mark.parametrize("error", [RuntimeError("gone"), asyncio.CancelledError()])
def test_a_coordinator_that_is_gone_for_a_while(error):
    async def run() -> None:
        coordinator = Coordinator()

        async def on_view(_: View) -> None:
            pass

        heartbeat = Heartbeat(coordinator, describe, on_view)
        coordinator.error = error
        heartbeat.start()
        await until(lambda: len(coordinator.heard) > 3)
        assert not heartbeat.is_answered
        coordinator.error = None
        await until(lambda: heartbeat.is_answered)
        await heartbeat.stop()

    asyncio.run(run())


def test_errors_of_the_actor_itself_are_logged_and_end_nothing(caplog):
    async def run() -> None:
        coordinator, described = Coordinator(), []

        def failing_describe() -> Member:
            described.append(1)
            if len(described) == 1:
                raise ZeroDivisionError("describe")
            return describe()

        followed = []

        async def on_view(_: View) -> None:
            followed.append(1)
            if len(followed) == 1:
                raise ZeroDivisionError("follow")

        heartbeat = Heartbeat(coordinator, failing_describe, on_view)
        heartbeat.start()
        await until(lambda: len(followed) > 2)
        await heartbeat.stop()

    asyncio.run(run())
    assert "ZeroDivisionError: describe" in caplog.text
    assert "ZeroDivisionError: follow" in caplog.text


def test_names_differ():
    assert len({member_name("decode") for _ in range(50)}) == 50
