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
        """One heartbeat, and what came back."""
        self.view = await self._coordinator.heartbeat.remote(self._describe())
        await self._on_view(self.view)
        return self.view

    async def stop(self) -> None:
        """Stop beating and leave the cluster."""
        if self._task is not None:
            self._task.cancel()
        name = self._describe().name
        try:
            await asyncio.wait_for(self._coordinator.leave.remote(name), timeout=2.0)
        except Exception:
            logger.info("%s left without the coordinator, which will notice", name)

    async def _run(self) -> None:
        while True:
            try:
                await self.beat()
            except Exception as error:
                logger.warning("no answer from the coordinator: %s", type(error).__name__)
            await asyncio.sleep(BEAT_S if self.view.is_ready else HURRY_S)


def host_and_pid() -> dict[str, Any]:
    """Where this process runs, for people who look for it."""
    return {"host": platform.node(), "pid": os.getpid()}
