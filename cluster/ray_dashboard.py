"""Ray's dashboard server as people and scripts use it: how many actors a pool has and shall have.

Our own autoscaler goes this way too, so that every change shows in the dashboard's Serve tab.
"""

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

from cluster.errors import NodeUnavailable, TriviumError

ANSWER_S = 8.0  # sooner than a gateway gives the coordinator up, so that people hear what is wrong
STARTING, RUNNING, STOPPING = "starting", "running", "stopping"
STATES = {
    "STARTING": STARTING,
    "RECOVERING": STARTING,
    "UPDATING": STARTING,
    "PENDING_MIGRATION": RUNNING,
    "RUNNING": RUNNING,
    "STOPPING": STOPPING,
}
"""By Serve's name of a replica's state."""


@dataclass(frozen=True)
class DashboardAccess:
    """Where the server is, and the headers that it wants to see."""

    address: str
    headers: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class PoolTarget:
    """What Serve has for a pool: the number it aims at, and actors on their way in and out."""

    target_count: int
    starting_count: int
    stopping_count: int


class RayDashboard:
    """The server's calls about one application; an async context."""

    def __init__(self, access: DashboardAccess, application: str):
        self._access = access
        self._application = application
        self._session = aiohttp.ClientSession(
            headers=access.headers, timeout=aiohttp.ClientTimeout(total=ANSWER_S)
        )

    async def __aenter__(self) -> "RayDashboard":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of its connections."""
        await self._session.close()

    async def targets(self) -> dict[str, PoolTarget]:
        """What there is of each pool; raises NodeUnavailable where the server does not tell."""
        body = await self._call("GET", "/api/serve/applications/")
        try:
            deployments = body["applications"][self._application]["deployments"]
            return {name: read_target(deployment) for name, deployment in deployments.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unanswered("it tells nothing of the pools") from error

    async def scale(self, pool: str, count: int) -> None:
        """Have Serve aim at `count` actors of a pool; raises NodeUnavailable where it does not."""
        path = f"/api/v1/applications/{self._application}/deployments/{pool}/scale"
        await self._call("POST", path, json={"target_num_replicas": count})

    async def _call(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            async with self._session.request(method, self._access.address + path, **arguments) as response:
                if response.status >= 300:
                    raise unanswered(f"it answers {response.status}")
                return await response.json(content_type=None)
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            raise unanswered(type(error).__name__) from error


def read_target(deployment: dict[str, Any]) -> PoolTarget:
    """One deployment as the server describes it; raises KeyError for what is no description."""
    states = [STATES.get(replica["state"], STARTING) for replica in deployment["replicas"]]
    counts = (states.count(state) for state in (STARTING, STOPPING))
    return PoolTarget(int(deployment["target_num_replicas"]), *counts)


def unanswered(why: str) -> TriviumError:
    """The error where the dashboard's server does not do what it was asked."""
    return NodeUnavailable(
        "RAY_DASHBOARD_SILENT",
        f"the Ray dashboard's server did not do it: {why}",
        remedy="Pools are scaled through it: start the cluster with dashboard.enabled.",
    )
