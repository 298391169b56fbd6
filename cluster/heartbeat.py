"""How an actor stays in touch with the coordinator."""

import asyncio
import logging
import os
import secrets
import platform
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.membership import Member, View

logger = logging.getLogger(__name__)

HURRY_S = 0.05
BEAT_S = 0.5
ANSWER_S = 2.0


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
        self._coordinator = coordinator
        self._describe = describe
        self._on_view = on_view
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        """Beat in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def beat(self) -> View:
        """One heartbeat, and what came back; raises TimeoutError where the coordinator does not answer."""
        self.view = await asyncio.wait_for(self._coordinator.heartbeat.remote(self._describe()), ANSWER_S)
        await self._on_view(self.view)
        return self.view

    async def announce(self) -> None:
        """Tell the coordinator about a change at once, if it is there."""
        await self._try(self.beat())

    async def stop(self) -> None:
        """Stop beating and leave the cluster."""
        if self._task is not None:
            self._task.cancel()
        await self._try(asyncio.wait_for(self._coordinator.leave.remote(self._describe().name), ANSWER_S))

    async def _try(self, call: Awaitable) -> None:
        try:
            await call
        except Exception as error:  # a coordinator that is gone is no reason to stay
            logger.info("no answer from the coordinator: %s", type(error).__name__)

    async def _run(self) -> None:
        while True:
            await self._try(self.beat())
            await asyncio.sleep(BEAT_S if self.view.is_ready else HURRY_S)


def host_and_pid() -> dict[str, Any]:
    """Where this process runs, for people who look for it."""
    return {"host": platform.node(), "pid": os.getpid()}
