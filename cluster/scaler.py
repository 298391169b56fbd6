"""Looks at the pools from time to time, and has Ray Serve do what the autoscaler or a person decides."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cluster.autoscaler import Autoscaler, Command
from cluster.config import ClusterConfig
from cluster.errors import InvalidRequest, NodeUnavailable, TriviumError
from cluster.membership import Membership
from cluster.place import autoscaler_config
from cluster.pool_readings import PoolReadings
from cluster.ray_dashboard import PoolTarget, RayDashboard, unanswered
from cluster.scaling import EXPERTS, PARTNERS, ChangeRole, Hold, PoolReading, PoolsReport, ScalePool
from cluster.view import READY, View

logger = logging.getLogger(__name__)

RECALL_S = 10.0  # after its begin a coordinator believes what members say of holds


class Scaler:
    """The acting half of the autoscaler; all in the coordinator's event loop."""

    def __init__(
        self, config: ClusterConfig, membership: Membership, window: Any, shards_bounds: tuple[int, int]
    ):
        """`window.dashboard()` tells where Ray's dashboard server is; shards lie within their bounds."""
        self.autoscaler = Autoscaler(autoscaler_config(config, shards_bounds))
        self._begun_s = time.monotonic()
        self._period_s = config.autoscaler.period_s
        self._membership = membership
        self._window = window
        self._shards_bounds = shards_bounds
        self._readings = PoolReadings(config.decode.requests_max)
        self._starts: dict[str, tuple[int, int, float]] = {}  # by pool: count asked, nodes then ready, when
        self._changes: dict[str, tuple[str, float]] = {}  # by node: the kind that it is to be, asked when
        self._read: dict[str, PoolReading] = {}
        self._is_loaded = False
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
        access = self._window.dashboard()
        if access is None:
            self._watch()
            return
        async with RayDashboard(access, self._window.application) as server:
            await self._look(server, await server.targets())

    def _watch(self) -> None:
        """Read the pools without Ray's server: their load is seen, though nobody can scale them."""
        now_s = time.monotonic()
        view = self._membership.view(now_s)
        counts = Counter(member.pool or member.kind for member in view.members)
        targets = {kind: PoolTarget(count, 0, 0) for kind, count in counts.items()}
        self.autoscaler.observe(self._readings.read(view, targets, self._slowness(), now_s), now_s)

    async def _look(self, server: RayDashboard, targets: Mapping[str, PoolTarget]) -> None:
        now_s = time.monotonic()
        view = self._membership.view(now_s)
        readings = self._readings.read(view, targets, self._slowness(), now_s)
        self._time(readings, view, now_s)
        self._is_loaded = self._is_loaded or view.is_ready
        for command in self.autoscaler.decide(readings, now_s, self._is_loaded):
            await self._do(server, command, now_s)

    async def set_count(self, kind: str, count: int | None, by: str) -> None:
        """Set a pool's count, or keep the one it has, until released; or TriviumError."""
        if kind == EXPERTS and count is not None:
            self._check_shards(count)
        access = self._window.dashboard()
        if access is None:
            raise unanswered("there is none")
        async with RayDashboard(access, self._window.application) as server:
            if count is not None:
                self._check_lent(kind, count)
            before = next((hold for hold in self.autoscaler.holds if hold.kind == kind), None)
            count = self.autoscaler.hold(kind, count, by, time.monotonic())
            try:
                await server.scale(kind, count)
            except TriviumError:
                self.autoscaler.put_back(kind, before)
                raise

    def _check_shards(self, count: int) -> None:
        least, most = self._shards_bounds
        if not least <= count <= most:
            raise InvalidRequest(
                "WRONG_SHARDS_COUNT",
                f"{count} shards cannot hold the experts as the configuration wants them",
                field="count",
                limit=f"{least} to {most}",
                remedy="Ask for a count within the limit, or change experts.weights_bytes or replicas_min.",
            )

    def _check_lent(self, kind: str, count: int) -> None:
        """Serve may end those that are at home: lent ones come back first. Or NodeUnavailable."""
        reading = self._read.get(kind)
        lent_count = reading.lent_count if reading is not None else 0
        if count > lent_count or not lent_count or kind not in PARTNERS:
            return
        roles = self._membership.view(time.monotonic()).roles
        called_count = sum(role == kind for role in roles.values())
        for _ in range(lent_count - count + 1 - called_count):
            self._membership.lend(PARTNERS[kind], kind)
        raise NodeUnavailable(
            "NODES_ARE_LENT",
            f"{lent_count} of the {kind} nodes serve the other pool and are called home",
            field="count",
            limit=f"more than {lent_count} for now",
            remedy="Ask again in a few seconds.",
            retry_after_s=10.0,
        )

    def recall(self, holds: tuple[Hold, ...]) -> None:
        """Take what members know of an earlier coordinator's holds, while this one has just begun."""
        now_s = time.monotonic()
        if now_s - self._begun_s <= RECALL_S:
            for hold in holds:
                self.autoscaler.recall(hold, now_s)

    def release(self, kind: str) -> None:
        """Let the load decide about a pool again; raises InvalidRequest."""
        self.autoscaler.release(kind, time.monotonic())

    def report(self) -> PoolsReport:
        """All pools and the decisions of late."""
        return self.autoscaler.report(time.monotonic())

    async def _do(self, server: RayDashboard, command: Command, now_s: float) -> None:
        match command:
            case ScalePool(kind, count, reason):
                logger.warning("%s: %d actors from now on: %s", kind, count, reason)
                reading = self._read[kind]
                if count > reading.target_count:
                    more_count = count - reading.target_count
                    self._starts[kind] = (count, reading.ready_count + more_count, now_s)
                await server.scale(kind, count)
            case ChangeRole(from_kind, to_kind, reason):
                name = self._membership.lend(from_kind, to_kind)
                if name is None:
                    self.autoscaler.nobody_changes(command)
                    return
                logger.warning("%s becomes a %s node: %s", name, to_kind, reason)
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
