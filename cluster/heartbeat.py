"""How an actor stays in touch with the coordinator."""

import asyncio
import logging
import os
import platform
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from cluster.view import BEAT_S, Member, View
from experts.messages import Placement

logger = logging.getLogger(__name__)

ANSWER_S = 2.0
FAREWELL_S = 1.0  # in which whoever leaves is heard, unless the coordinator has left before
SENT_S = 0.1  # in which a call leaves this process, whether anybody hears it or not


def member_name(kind: str) -> str:
    """A name that no other member has, short enough to be read."""
    return f"{kind}-{secrets.token_hex(3)}"


class Heartbeat:
    """Tells the coordinator about this actor, and this actor what the coordinator knows, until stopped."""

    def __init__(
        self,
        coordinator: Any,
        describe: Callable[[], Member],
        on_view: Callable[[View], Awaitable[None]],
    ):
        self.view = View()
        self.is_answered = False
        self._placement: Placement | None = None
        self._coordinator = coordinator
        self._describe = describe
        self._on_view = on_view
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task] = []

    def start(self) -> None:
        """Beat and follow in the running event loop: two tasks, so that slow following stops no heartbeat."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run()), loop.create_task(self._follow())]

    async def announce(self, timeout_s: float = ANSWER_S) -> None:
        """Tell the coordinator how things are, now; what it answers is followed in its turn."""
        member = self._describe()
        before = self.view
        epochs_known = frozenset(placement.epoch for placement in before.placements)
        member = replace(member, epochs_known=epochs_known, holds=before.holds)
        if before.placement is None:  # the coordinator may have begun anew: tell it where things stand
            member = replace(member, placement=self._placement)
        answer = await self._answer(self._coordinator.heartbeat, member, timeout_s)
        self.is_answered = answer is not None
        if answer is not None:
            self.view = answer.completed(before)
            self._placement = self.view.placement_in_force or self._placement
            self._news.set()

    async def stop(self) -> None:
        """Stop beating and leave the cluster; where nobody answered the last time, nobody is waited for."""
        for task in self._tasks:
            task.cancel()
        self._tasks = [asyncio.get_running_loop().create_task(self._leave())]
        await asyncio.wait(self._tasks, timeout=FAREWELL_S if self.is_answered else SENT_S)

    async def _leave(self) -> None:
        try:
            await self._coordinator.leave.remote(self._describe().name)
        except Exception as error:
            logger.info("nobody heard that this actor left: %s", type(error).__name__)

    async def _answer(self, method: Any, argument: Any, timeout_s: float) -> Any:
        """What the coordinator answers; None where it does not, which is no reason to stop."""
        try:
            return await asyncio.wait_for(method.remote(argument), timeout_s)
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            logger.info("the call to the coordinator was cancelled, not this task")
        except Exception as error:
            logger.info("no answer from the coordinator: %s", type(error).__name__)
        return None

    async def _run(self) -> None:
        while True:
            try:
                await self.announce()
            except Exception:
                logger.exception("this actor cannot describe itself; it goes on trying")
            await asyncio.sleep(self.view.pace_s)

    async def _follow(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._on_view(self.view)
            except Exception:
                logger.exception("what the coordinator says could not be followed; the next view is")
                await asyncio.sleep(BEAT_S)


def host_and_pid() -> dict[str, Any]:
    """Where this process runs, for people who look for it."""
    return {"host": platform.node(), "pid": os.getpid()}
