"""Looks at the pools from time to time, and has Ray Serve do what the autoscaler or a person decides."""

import asyncio
import logging
import time
from typing import Any

from cluster.autoscaler import Autoscaler, Command, autoscaler_config
from cluster.config import ClusterConfig
from cluster.errors import InvalidRequest, TriviumError
from cluster.membership import READY, Membership, View
from cluster.pool_readings import PoolReadings
from cluster.ray_dashboard import RayDashboard, unanswered
from cluster.scaling import EXPERTS, ChangeRole, PoolReading, PoolsReport, ScalePool

logger = logging.getLogger(__name__)


class Scaler:
    """The acting half of the autoscaler; all in the coordinator's event loop."""

    def __init__(self, config: ClusterConfig, membership: Membership, window: Any, shards_max: int):
        """`window.dashboard()` tells where Ray's dashboard server is; more than `shards_max` have no use."""
        self.autoscaler = Autoscaler(autoscaler_config(config))
        self._period_s = config.autoscaler.period_s
        self._membership = membership
        self._window = window
        self._shards_max = shards_max
        self._readings = PoolReadings(config.decode.requests_max)
        self._dashboard: RayDashboard | None = None
        self._starts: dict[str, tuple[int, int, float]] = {}  # by pool: count asked, nodes then ready, when
        self._changes: dict[str, tuple[str, float]] = {}  # by node: the kind that it is to be, asked when
        self._read: dict[str, PoolReading] = {}
        self._problem = ""

    async def run(self) -> None:
        """Look for ever; what goes wrong once is told once, and tried again."""
        while True:
            try:
                await self.look()
                self._problem = ""
            except TriviumError as error:
                self._tell(error.message)
            except Exception:
                logger.exception("the pools could not be looked at; they are again in a moment")
            await asyncio.sleep(self._period_s)

    async def look(self) -> None:
        """Read the pools, decide, and act; raises NodeUnavailable where Ray's server does not answer."""
        targets = await self._server().targets()
        now_s = time.monotonic()
        view = self._membership.view(now_s)
        readings = self._readings.read(view, targets, self._slowness(), now_s)
        self._time(readings, view, now_s)
        for command in self.autoscaler.decide(readings, now_s):
            await self._do(command, now_s)

    async def set_count(self, kind: str, count: int | None, by: str) -> None:
        """Set a pool's count, or keep the one it has, until released; or TriviumError."""
        if kind == EXPERTS and count is not None and count > self._shards_max:
            raise InvalidRequest(
                "TOO_MANY_SHARDS",
                f"{count} shards cannot share {self._shards_max} experts",
                field="count",
                limit=str(self._shards_max),
                remedy="Ask for fewer shards.",
            )
        server = self._server()
        count = self.autoscaler.hold(kind, count, by, time.monotonic())
        await server.scale(kind, count)

    def release(self, kind: str) -> None:
        """Let the load decide about a pool again; raises InvalidRequest."""
        self.autoscaler.release(kind, time.monotonic())

    def report(self) -> PoolsReport:
        """All pools and the decisions of late."""
        return self.autoscaler.report(time.monotonic())

    async def close(self) -> None:
        """Let go of Ray's server."""
        if self._dashboard is not None:
            await self._dashboard.close()

    def _server(self) -> RayDashboard:
        if self._dashboard is None:
            access = self._window.dashboard()
            if access is None:
                raise unanswered("there is none")
            self._dashboard = RayDashboard(access, self._window.application)
        return self._dashboard

    async def _do(self, command: Command, now_s: float) -> None:
        match command:
            case ScalePool(kind, count, reason):
                logger.warning("%s: %d actors from now on: %s", kind, count, reason)
                reading = self._read[kind]
                if count > reading.target_count:
                    more_count = count - reading.target_count
                    self._starts[kind] = (count, reading.ready_count + more_count, now_s)
                await self._server().scale(kind, count)
            case ChangeRole(from_kind, to_kind, reason):
                name = self._membership.lend(from_kind, to_kind)
                logger.warning("%s becomes a %s node: %s", name or "nobody", to_kind, reason)
                if name is not None:
                    self._changes[name] = (to_kind, now_s)

    def _time(self, readings: tuple[PoolReading, ...], view: View, now_s: float) -> None:
        """Tell the autoscaler how long starts and changes of role have taken."""
        self._read = {reading.kind: reading for reading in readings}
        for reading in readings:
            asked_count, ready_count, since_s = self._starts.get(reading.kind, (0, 0, 0.0))
            if asked_count and reading.target_count != asked_count:
                del self._starts[reading.kind]  # called off, or overtaken: what comes later began later
            elif asked_count and reading.ready_count >= ready_count:
                del self._starts[reading.kind]
                self.autoscaler.timed(start_s=now_s - since_s)
        names = {member.name for member in view.members}
        for name, (kind, since_s) in list(self._changes.items()):
            if name not in names and all(member.state == READY for member in view.of_kind(kind)):
                del self._changes[name]
                self.autoscaler.timed(role_change_s=now_s - since_s)

    def _slowness(self) -> float | None:
        report = self._membership.experts.report(self._membership.problem)
        return None if report.is_moving or report.placement is None else report.balance.slowness

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            logger.warning("pools cannot be scaled now: %s", problem)
        self._problem = problem
