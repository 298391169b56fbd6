"""The one actor that knows everybody; it holds nothing that members would not tell it again."""

import asyncio
import logging
import sys
import time
from dataclasses import replace
from typing import Any

from cluster.errors import TriviumError
from cluster.logs import begin_logs
from cluster.membership import Membership
from cluster.operations import Operations
from cluster.place import Place, kept_expert_bytes, plan_config, rebalance_config, shards_bounds
from cluster.scaler import Scaler
from cluster.scaling import PoolsReport
from cluster.view import Member, View
from experts.compiled import is_compiled
from experts.errors import ExpertsMoving
from experts.messages import Homes
from experts.plan import Planner
from experts.rebalance import Forecast
from experts.report import ExpertsReport
from kernels.model.config import ModelConfig

logger = logging.getLogger(__name__)

PREPARE_TIMEOUT_S = 600.0
COMPILE = ("-m", "experts.prepare")


class Coordinator:
    """Heartbeats in, views out; if it dies, the next heartbeats rebuild it."""

    async def __init__(self, place: Place, window: Any):
        """`window.dashboard()` tells where Ray's dashboard server is."""
        begin_logs("coordinator", place.config.operations.json_logs)
        model = ModelConfig.from_folder(place.config.model.folder)
        self._planner = Planner.of_model(model, plan_config(model, place.config))
        self._membership = Membership(
            model,
            place.config.experts.shards_count,
            self._planner,
            rebalance_config(place.config),
            kept_expert_bytes(model, place.config),
        )
        self._preparing = asyncio.create_task(self._prepare())
        self._scaler = Scaler(place.config, self._membership, window, shards_bounds(model, place.config))
        self._scaling = asyncio.create_task(self._scaler.run())
        self.operations = Operations(place, self._membership, self._scaler, window)
        await self.operations.start()

    async def heartbeat(self, member: Member) -> View:
        """Take a member's word and tell it what it goes by."""
        self._scaler.recall(member.holds)
        view = self._membership.heartbeat(replace(member, holds=()), time.monotonic())
        return replace(view, holds=self._scaler.autoscaler.holds)

    async def leave(self, name: str) -> None:
        """A member has ended in good order."""
        self._membership.leave(name)

    async def view(self) -> View:
        """What the coordinator knows."""
        return self._membership.view(time.monotonic())

    async def lend(self, from_kind: str, to_kind: str) -> str | None:
        """Have a node serve as the other kind; its name, or None where none can be asked."""
        return self._membership.lend(from_kind, to_kind)

    async def pools_page(self) -> str:
        """Where the Pools page is, with the token behind `#`; empty where there is none."""
        return self.operations.page

    async def pools(self) -> PoolsReport:
        """How many actors each pool has, and why."""
        return self._scaler.report()

    async def set_pool(self, kind: str, count: int | None, by: str) -> PoolsReport | TriviumError:
        """Set a pool's count, or hold the one it has, until released."""
        try:
            await self._scaler.set_count(kind, count, by)
        except TriviumError as error:
            return error
        return self._scaler.report()

    async def release_pool(self, kind: str) -> PoolsReport | TriviumError:
        """Let the load decide about a pool again."""
        try:
            self._scaler.release(kind)
        except TriviumError as error:
            return error
        return self._scaler.report()

    async def __del__(self) -> None:
        """End what was begun here."""
        self._scaling.cancel()
        await self.operations.stop()

    async def experts(self) -> ExpertsReport:
        """How the experts are placed and loaded."""
        return self._membership.experts.report(self._membership.problem)

    async def forecast(self) -> Forecast | ExpertsMoving:
        """What a rebalance would do now; what stands in its way is an answer too, not a failure."""
        try:
            return self._membership.experts.forecast()
        except ExpertsMoving as error:
            return error

    async def move_to(self, homes: Homes, epoch: int) -> Forecast | ExpertsMoving | ValueError:
        """Rebalance from the placement of an epoch to given homes, or say why not."""
        try:
            return self._membership.experts.move_to(homes, epoch, time.monotonic())
        except (ExpertsMoving, ValueError) as error:
            return error

    async def _prepare(self) -> None:
        """Have the search of placements compiled by another process: here it would hold up all heartbeats."""
        try:
            if not is_compiled():
                compiler = await asyncio.create_subprocess_exec(sys.executable, *COMPILE)
                await asyncio.wait_for(compiler.wait(), PREPARE_TIMEOUT_S)
            await asyncio.to_thread(self._planner.prepare)
        except Exception:
            logger.exception("placements stay even: the search for better ones could not be compiled")
