"""Ray's dashboard server as far as pools are scaled by it: the two calls, answered as Ray 2.60 does."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.ray_dashboard import DashboardAccess

APPLICATION = "trivium"
BEARER = {"Authorization": "Bearer the cluster's token"}


class RayServer:
    """What Serve aims at, by pool, and all that it was asked for."""

    def __init__(self, **targets: int):
        self.targets = targets
        self.states = {name: ["RUNNING"] * count for name, count in targets.items()}
        self.asked: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        self.instead: Callable[[], Awaitable[web.Response]] | None = None
        """What answers in place of Ray."""

    def application(self) -> web.Application:
        """Both calls."""
        made = web.Application()
        path = "/api/v1/applications/{application}/deployments/{deployment}/scale"
        made.router.add_get("/api/serve/applications/", self._details)
        made.router.add_post(path, self._scale)
        return made

    async def _details(self, request: web.Request) -> web.Response:
        self.calls["details"] += 1
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        deployments = {
            name: {
                "name": name,
                "status": "HEALTHY",
                "message": "",
                "target_num_replicas": count,
                "replicas": [{"replica_id": str(one), "state": one} for one in self.states[name]],
            }
            for name, count in self.targets.items()
        }
        described = {"name": APPLICATION, "status": "RUNNING", "deployments": deployments}
        return web.json_response(
            {"controller_info": {}, "target_capacity": None, "applications": {APPLICATION: described}}
        )

    async def _scale(self, request: web.Request) -> web.Response:
        self.calls["scale"] += 1
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        where, body = request.match_info, await request.json()
        if where["application"] != APPLICATION or where["deployment"] not in self.targets:
            return web.json_response({"error": "Application or Deployment not found"}, status=404)
        if set(body) != {"target_num_replicas"} or not isinstance(body["target_num_replicas"], int):
            return web.json_response({"error": "Invalid request body"}, status=400)
        self.targets[where["deployment"]] = body["target_num_replicas"]
        self.asked.append((where["deployment"], body["target_num_replicas"]))
        return web.json_response({"message": "Scaling request received."})

    async def _refusal(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") != BEARER["Authorization"]:
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await self.instead() if self.instead is not None else None


@asynccontextmanager
async def ray_server(**targets: int) -> AsyncIterator[tuple[RayServer, DashboardAccess]]:
    """One that listens, and how to come to it."""
    ray = RayServer(**targets)
    async with TestServer(ray.application()) as server:
        yield ray, DashboardAccess(str(server.make_url("")).rstrip("/"), BEARER)


class Window:
    """What an actor is given to see Ray by."""

    application = APPLICATION

    def __init__(self, access: DashboardAccess | None = None):
        self.access = access
        self.published: list[list] = []

    def dashboard(self) -> DashboardAccess | None:
        """As the real one does."""
        return self.access

    def publish(self, samples) -> None:
        """Keep what Ray's exporter would carry."""
        self.published.append(list(samples))
