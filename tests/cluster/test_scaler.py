"""What is decided is done through Ray's server, and what took how long is told; a clock of the test's own."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from cluster import ray_dashboard
from cluster import scaler as scaler_module
from cluster.config import check_config
from cluster.errors import InvalidRequest, NodeUnavailable
from cluster.gateway_report import GatewayReport
from cluster.membership import Membership
from cluster.scaler import Scaler
from cluster.scaling import ChangeRole, Hold, PoolsReport, PoolState
from cluster.view import STARTING, Member, View
from decode.messages import NodeReport
from experts.config import PlanConfig
from experts.messages import Placement
from experts.plan import Planner
from experts.rebalance import RebalanceConfig
from kernels.model.config import ModelConfig
from tests.cluster.ray_server import RayServer, Window, ray_server
from tests.cluster.served import until

FOLDER = Path("examples/trivium-small")
SHARDS_BOUNDS = SHARDS_MIN, SHARDS_MAX = 2, 16
LOOK_S = 1.0


def node(name: str, kind: str, pages_leased_count: int = 5, pid: int = 0, **about: str) -> Member:
    """A prefill or decode node with 100 pages."""
    zeros = dict.fromkeys(list(NodeReport.__dataclass_fields__)[3:14], 0)
    numbers = {"pages_total_count": 100, "pages_leased_count": pages_leased_count, "experts_epoch": 1}
    report = NodeReport(name, kind, f"memory://{name}", **zeros | numbers)
    return Member(name, kind, f"memory://{name}", pid=pid, report=report, **about)


class PlacedMembership(Membership):
    """One whose experts are placed: nodes are all that is awaited."""

    def view(self, now_s: float) -> View:
        """With a placement in force."""
        return replace(super().view(now_s), placement_in_force=Placement(1, 1, (), ()))


class Town:
    """A scaler, the members that it sees, and the Ray that obeys it."""

    def __init__(self, clock: SimpleNamespace, ray: RayServer, window: Window, **autoscaler: object):
        model = ModelConfig.from_folder(FOLDER)
        values = {
            "model": {"folder": str(FOLDER)},
            "autoscaler": {"period_s": 0.01, "shrink_pause_s": 10.0} | autoscaler,
        }
        planner = Planner.of_model(model, PlanConfig())
        self.membership = PlacedMembership(model, 2, planner, RebalanceConfig(), expert_bytes=1)
        self.scaler = Scaler(check_config(values, "test", Path.cwd()), self.membership, window, SHARDS_BOUNDS)
        self.ray, self.window = ray, window
        self.members: dict[str, Member] = {}
        self.timings: list[dict[str, float]] = []
        self.scaler.autoscaler.timed = lambda **times: self.timings.append(times)
        self._clock = clock
        self.add(Member("g", "gateway", "", pid=9, report=GatewayReport()))

    def add(self, *members: Member) -> None:
        """Members that beat from now on."""
        self.members |= {member.name: member for member in members}

    def leave(self, name: str) -> None:
        """A member goes in good order."""
        del self.members[name]
        self.membership.leave(name)

    async def look(self, looks_count: int = 1) -> None:
        """Everybody beats, and the scaler looks, once a second."""
        for _ in range(looks_count):
            self._clock.now_s += LOOK_S
            for member in self.members.values():
                self.membership.heartbeat(member, self._clock.now_s)
            await self.scaler.look()

    def plant(self, *commands: object) -> None:
        """Have these decided at the next look."""
        left = list(commands)
        decide = self.scaler.autoscaler.decide

        def planted(readings, now_s: float, is_loaded: bool) -> list:
            decide(readings, now_s, is_loaded)
            return [left.pop()] if left else []

        self.scaler.autoscaler.decide = planted

    def report(self) -> PoolsReport:
        """As people see it."""
        return self.scaler.report()

    def pool(self, kind: str) -> PoolState:
        """One pool of it."""
        return next(pool for pool in self.report().pools if pool.kind == kind)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The scaler's own."""
    made = SimpleNamespace(now_s=1000.0)
    made.monotonic = lambda: made.now_s
    monkeypatch.setattr(scaler_module, "time", made)
    return made


@pytest.fixture
def heard() -> Iterator[list[logging.LogRecord]]:
    """What the scaler writes to its log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    scaler_module.logger.addHandler(handler)
    yield records
    scaler_module.logger.removeHandler(handler)


@asynccontextmanager
async def town_of(clock: SimpleNamespace, enabled: bool = True, **targets: int) -> AsyncIterator[Town]:
    """A town in which Serve aims at so many."""
    targets = {"gateway": 1, "prefill": 1, "decode": 1, "experts": 2} | targets
    async with ray_server(**targets) as (ray, access):
        yield Town(clock, ray, Window(access), enabled=enabled)


def test_a_full_pool_grows_through_ray_and_the_start_is_timed(clock, heard):
    async def run() -> None:
        async with town_of(clock) as town:
            town.add(node("d", "decode", 95, pid=1), node("p", "prefill", pid=2))
            await town.look()
            assert town.ray.asked == [("decode", 2)]
            assert "decode: 2 actors from now on: 95 % of pages" in heard[0].getMessage()
            await town.look(3)
            assert town.ray.asked == [("decode", 2)] and town.timings == []
            assert town.report().decisions[0].to_count == 2 and town.pool("decode").starting_count == 1
            town.add(node("e", "decode", pid=3))
            await town.look(3)
            assert town.timings == [{"start_s": 4 * LOOK_S}]

    asyncio.run(run())


def test_a_pool_with_room_shrinks_one_at_a_time_to_its_least(clock):
    async def run() -> None:
        async with town_of(clock, decode=3) as town:
            town.add(
                *(node(f"d{pid}", "decode", 1, pid=pid) for pid in range(3)), node("p", "prefill", pid=8)
            )
            await town.look(9)
            assert town.ray.asked == []
            await town.look(3)
            assert town.ray.asked == [("decode", 2)]
            town.leave("d2")
            await town.look(30)
            assert town.ray.asked == [("decode", 2), ("decode", 1)]
            town.leave("d1")
            await town.look(30)
            assert town.ray.asked == [("decode", 2), ("decode", 1)] and town.timings == []

    asyncio.run(run())


def test_while_the_cluster_loads_no_pool_changes_but_by_people(clock):
    """Prefill nodes are there and idle, and decode takes minutes: neither is too large for that."""

    async def run() -> None:
        async with town_of(clock, prefill=2, decode=2) as town:
            late = node("d", "decode", pid=3)
            town.add(node("p", "prefill", 0, pid=1), node("q", "prefill", 0, pid=2))
            town.add(replace(late, state=STARTING, report=None))
            await town.look(120)
            assert town.ray.asked == [] and town.pool("prefill").outlook == "the cluster still loads"
            await town.scaler.set_count("decode", 1, "a person")
            town.ray.targets["decode"] = 2  # the call was lost
            await town.look(40)
            assert town.ray.asked == [("decode", 1), ("decode", 1)], "a person's count is kept all the same"
            town.add(late)
            await town.look(12)
            assert town.ray.asked[2:] == [("prefill", 1)], "from now on the load decides"
            town.leave("d")
            await town.look(12)
            assert town.pool("prefill").outlook != "the cluster still loads", "it has served once"

    asyncio.run(run())


def test_a_start_that_was_called_off_is_not_timed(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            town.add(node("d", "decode", 95, pid=1), node("p", "prefill", pid=2))
            await town.look(2)
            await town.scaler.set_count("decode", 1, "a person")
            await town.look(100)
            await town.scaler.set_count("decode", 2, "a person")
            await town.look()
            town.add(node("e", "decode", pid=3))
            await town.look()
            assert town.timings == [], "a person's wait of minutes is no start of a node"

    asyncio.run(run())


def test_a_change_of_role_is_asked_of_a_member_and_timed(clock, heard):
    async def run() -> None:
        async with town_of(clock) as town:
            town.add(node("d", "decode", pid=1), node("p", "prefill", pid=2))
            town.plant(ChangeRole("prefill", "decode", "pages"))
            await town.look()
            assert town.membership.view(clock.now_s).roles == {"p": "decode"}
            assert heard[-1].getMessage() == "p becomes a decode node: pages"
            await town.look(2)
            town.leave("p")
            made = node("p2", "decode", pid=2, pool="prefill")
            town.add(replace(made, state=STARTING, report=None))
            await town.look()
            assert town.timings == []
            town.add(made)
            await town.look(2)
            assert town.timings == [{"role_change_s": 4 * LOOK_S}] and town.ray.asked == []
            assert town.pool("prefill").lent_count == town.pool("decode").borrowed_count == 1

    asyncio.run(run())


def test_where_nobody_can_change_its_role_nothing_waits_for_it(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            town.add(node("d", "decode", pid=1))
            town.plant(ChangeRole("prefill", "decode", "pages"))
            await town.look(3)
            assert town.timings == [] and town.membership.view(clock.now_s).roles == {}

    asyncio.run(run())


def test_a_persons_count_goes_to_ray_at_once_and_holds_until_released(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            town.add(node("d", "decode", pid=1), node("p", "prefill", pid=2))
            await town.look()
            await town.scaler.set_count("decode", 3, "a person")
            assert town.ray.asked == [("decode", 3)]
            town.add(node("e", "decode", pid=3), node("f", "decode", pid=4))
            await town.look(40)
            hold = town.pool("decode").hold
            assert (hold.count, hold.by) == (3, "a person") and town.ray.asked == [("decode", 3)]
            town.scaler.release("decode")
            assert town.pool("decode").hold is None
            await town.look(12)
            assert town.ray.asked == [("decode", 3), ("decode", 2)]

    asyncio.run(run())


def test_a_count_by_the_dashboards_own_call_holds_too(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            town.add(node("d", "decode", pid=1), node("p", "prefill", pid=2))
            await town.look()
            town.ray.targets["decode"] = 4
            await town.look()
            assert town.pool("decode").hold.by == "the dashboard's API"

    asyncio.run(run())


def test_without_a_count_a_pool_is_held_at_what_it_has(clock):
    async def run() -> None:
        async with town_of(clock, decode=2) as town:
            town.add(node("d", "decode", pid=1), node("e", "decode", pid=2), node("p", "prefill", pid=3))
            await town.look()
            await town.scaler.set_count("decode", None, "a person")
            assert town.ray.asked == [("decode", 2)] and town.pool("decode").hold.count == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "count", "reason"),
    [
        ("experts", SHARDS_MAX + 1, "WRONG_SHARDS_COUNT"),
        ("experts", SHARDS_MIN - 1, "WRONG_SHARDS_COUNT"),
        ("decode", 0, "COUNT_OUT_OF_BOUNDS"),
        ("decode", 1025, "COUNT_OUT_OF_BOUNDS"),
        ("nowhere", 2, "UNKNOWN_POOL"),
        ("nowhere", None, "UNKNOWN_POOL"),
    ],
)
def test_counts_out_of_bounds_never_reach_ray(clock, kind: str, count: int | None, reason: str):
    async def run() -> None:
        async with town_of(clock) as town:
            await town.look()
            with pytest.raises(InvalidRequest) as caught:
                await town.scaler.set_count(kind, count, "a person")
            assert caught.value.reason == reason and caught.value.limit and caught.value.remedy
            assert town.membership.view(clock.now_s).roles == {}
            assert town.ray.asked == [] and all(pool.hold is None for pool in town.report().pools)
            with pytest.raises(InvalidRequest, match="there is no pool"):
                town.scaler.release("nowhere")

    asyncio.run(run())


def test_as_many_shards_as_experts_are_allowed(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            await town.look()
            await town.scaler.set_count("experts", SHARDS_MAX, "a person")
            assert town.ray.asked == [("experts", SHARDS_MAX)]

    asyncio.run(run())


def test_switched_off_it_looks_and_does_what_people_say_alone(clock):
    async def run() -> None:
        async with town_of(clock, enabled=False) as town:
            town.add(node("d", "decode", 100, pid=1), node("p", "prefill", pid=2))
            await town.look(20)
            assert town.ray.asked == [] and town.pool("decode").target_count == 1
            assert not town.report().is_enabled
            await town.scaler.set_count("decode", 2, "a person")
            assert town.ray.asked == [("decode", 2)]

    asyncio.run(run())


def test_without_a_dashboard_people_are_told_and_one_that_comes_is_found(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            access, town.window.access = town.window.access, None
            with pytest.raises(NodeUnavailable, match="there is none") as caught:
                await town.scaler.set_count("decode", 2, "a person")
            assert "dashboard.enabled" in caught.value.remedy
            assert town.pool("decode").hold is None, "a count that nobody will bring about does not hold"
            town.add(node("d", "decode", 99, pid=1), node("p", "prefill", pid=2))
            await town.look()
            pool = town.pool("decode")
            assert (pool.target_count, pool.ready_count) == (1, 1)
            assert [one.cause for one in pool.pressures if one.level > 1] == ["pages"], (
                "people see it all the same"
            )
            assert town.ray.asked == []
            town.window.access = access
            await town.look()
            assert town.ray.asked == [("decode", 2)]

    asyncio.run(run())


async def failing() -> web.Response:
    """Ray's server in trouble."""
    return web.json_response({"error": "Internal Server Error"}, status=503)


async def garbage() -> web.Response:
    """Somebody else's server."""
    return web.Response(text="<html>")


async def silent() -> web.Response:
    """A server that stands still."""
    await asyncio.sleep(1)
    return web.Response()


@pytest.mark.parametrize("trouble", [failing, garbage, silent])
def test_a_server_in_trouble_is_told_of_once_and_looked_at_again(clock, heard, monkeypatch, trouble):
    monkeypatch.setattr(ray_dashboard, "ANSWER_S", 0.05)

    async def run() -> None:
        async with town_of(clock) as town:
            town.ray.instead = trouble
            running = asyncio.create_task(town.scaler.run())
            await until(lambda: town.ray.calls["details"] >= 4)
            assert ["pools cannot be scaled now" in one.getMessage() for one in heard] == [True]
            with pytest.raises(NodeUnavailable):
                await town.scaler.set_count("decode", 2, "a person")
            town.ray.instead = None
            await until(lambda: town.pool("prefill").target_count == 1)
            town.ray.instead = trouble
            await until(lambda: len(heard) == 2)
            running.cancel()
            await asyncio.wait([running])

    asyncio.run(run())


def test_a_fault_of_ours_stops_no_further_look(clock, heard):
    async def run() -> None:
        async with town_of(clock) as town:
            decide, faults = town.scaler.autoscaler.decide, [ZeroDivisionError()]

            def faulty(readings, now_s: float, is_loaded: bool) -> list:
                if faults:
                    raise faults.pop()
                return decide(readings, now_s, is_loaded)

            town.scaler.autoscaler.decide = faulty
            running = asyncio.create_task(town.scaler.run())
            await until(lambda: town.pool("decode").target_count == 1)
            running.cancel()
            await asyncio.wait([running])
            assert [one.exc_info[0] for one in heard] == [ZeroDivisionError]

    asyncio.run(run())


def test_lent_nodes_are_called_home_before_their_pool_shrinks_to_them(clock):
    """Serve ends whom it likes, and it might be the one that serves at home."""

    async def run() -> None:
        async with town_of(clock, prefill=2) as town:
            at_home = node("p", "prefill", pid=1)
            lent, own = node("q", "decode", pid=2, pool="prefill"), node("d", "decode", pid=3)
            town.add(at_home, lent, own)
            await town.look()
            assert town.pool("prefill").lent_count == 1
            for _ in range(3):  # impatience calls nobody else
                with pytest.raises(NodeUnavailable) as caught:
                    await town.scaler.set_count("prefill", 1, "a person")
                assert caught.value.reason == "NODES_ARE_LENT"
            assert town.membership.view(clock.now_s).roles == {"q": "prefill"}
            assert town.ray.asked == [] and town.pool("prefill").hold is None
            town.leave("q")
            town.add(node("r", "prefill", pid=2))
            await town.look()
            await town.scaler.set_count("prefill", 1, "a person")
            assert town.ray.asked == [("prefill", 1)]

    asyncio.run(run())


def test_holds_of_an_earlier_coordinator_are_believed_at_the_beginning_alone(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            holds = (Hold("decode", 3, "a person", 1.0),)
            town.add(node("d", "decode", pid=1), node("p", "prefill", pid=2))
            town.scaler.recall(holds)
            await town.look()
            assert (town.pool("decode").hold.count, town.ray.asked) == (3, [("decode", 3)])
            town.scaler.release("decode")
            clock.now_s += scaler_module.RECALL_S
            town.scaler.recall(holds)
            assert town.pool("decode").hold is None

    asyncio.run(run())


def test_a_hold_that_ray_did_not_take_is_as_if_it_never_was(clock):
    async def run() -> None:
        async with town_of(clock) as town:
            town.add(node("d", "decode", pid=1), node("p", "prefill", pid=2))
            await town.look()
            town.ray.instead = failing
            with pytest.raises(NodeUnavailable):
                await town.scaler.set_count("decode", 3, "a person")
            assert town.pool("decode").hold is None

    asyncio.run(run())
