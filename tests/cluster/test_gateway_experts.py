"""The experts' service over real gRPC and a coordinator's answers, and the commands that ask it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster import cli, cli_experts
from cluster.client import Client, as_values, read_plan
from cluster.errors import InvalidRequest, NodeUnavailable
from cluster.gateway import Tokens, bind, make_server
from cluster.gateway_experts import ExpertsService
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.show_experts import colour_of
from experts.config import PlanConfig
from experts.errors import ExpertsMoving
from experts.load import RecentLoad
from experts.messages import Placement, ShardAddress
from experts.placement import even_homes
from experts.plan import Planner
from experts.rebalance import Rebalance, RebalanceConfig

LAYERS, EXPERTS = 2, 8


class Answering:
    """One method of a coordinator as Ray hands it out."""

    def __init__(self, method):
        self._method = method

    async def remote(self, *arguments):
        """Answer, refusals included, as the coordinator does."""
        try:
            return self._method(*arguments)
        except (ExpertsMoving, ValueError) as error:
            return error


class Coordinator:
    """A rebalance with three shards and a load on the first."""

    def __init__(self):
        planner = Planner(PlanConfig(spare_replicas=1), LAYERS, EXPERTS, 1)
        planner.is_ready = True
        load = RecentLoad(LAYERS, EXPERTS, 60.0, 5.0)
        self.rebalance = Rebalance(RebalanceConfig(), load, 1 << 20, planner)
        shards = tuple(ShardAddress(name, f"memory://{name}", "host") for name in "abc")
        self.rebalance.begin(Placement(1, 1, shards, (even_homes(3, EXPERTS),) * LAYERS), 0.0)
        self.settle(0.0)
        tokens = np.array([[900, 900, 900, 10, 10, 10, 10, 10]] * LAYERS)
        for now_s, total in ((0.5, tokens * 0), (1.0, tokens)):
            self.rebalance.observe("a", tuple(map(tuple, total.tolist())), now_s)
        self.experts = Answering(self.rebalance.report)
        self.forecast = Answering(self.rebalance.forecast)
        self.move_to = Answering(lambda homes, epoch: self.rebalance.move_to(homes, epoch, 2.0))

    def settle(self, now_s: float) -> None:
        """Everybody follows until nothing moves."""
        while True:
            placement = self.rebalance.placement
            self.rebalance.advance(dict.fromkeys("abc", placement.epoch), placement.epoch, now_s)
            if not self.rebalance.is_moving:
                return


@pytest.fixture
def coordinator() -> Coordinator:
    """A fresh one."""
    return Coordinator()


class DirectClient:
    """A client of the service without a wire between: one process, one loop, as gRPC likes it."""

    service: ExpertsService

    def __init__(self, address: str, token: str | None):
        self.address = address

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing was opened."""

    async def get_experts(self):
        """As `Client` does."""
        return await self.service.GetExperts(trivium_pb2.GetExpertsRequest(), None)

    async def plan_experts(self):
        """As `Client` does."""
        return await self.service.PlanExperts(trivium_pb2.PlanExpertsRequest(), None)

    async def move_experts(self, layers, placement_epoch: int):
        """As `Client` does."""
        request = trivium_pb2.MoveExpertsRequest(layers=layers, placement_epoch=placement_epoch)
        return await self.service.MoveExperts(request, None)


@pytest.fixture
def address(coordinator, monkeypatch) -> str:
    """Where the commands believe a gateway to be."""
    monkeypatch.setattr(DirectClient, "service", ExpertsService(coordinator), raising=False)
    monkeypatch.setattr(cli_experts, "Client", DirectClient)
    return "nowhere:1"


@asynccontextmanager
async def served(coordinator: Coordinator) -> AsyncIterator[str]:
    """A gateway's server with the experts' service alone."""
    server = make_server(1 << 20, Tokens())
    trivium_pb2_grpc.add_ExpertsServicer_to_server(ExpertsService(coordinator), server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def run(*arguments: str):
    """One command line."""
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "1000", "TERM": "dumb"})


def test_the_heat_map_shows_every_layer_and_shard(address, tmp_path: Path):
    picture = tmp_path / "experts.html"
    done = run("experts", "--address", address, "--output", str(picture))
    assert done.exit_code == 0, done.output
    hot = 3 * 2700 / 2750
    assert f"{hot:.2f}" in done.output and "nothing moves" in done.output
    assert "mean/max" in done.output and "(max - mean)/mean" in done.output
    assert f"{hot:.2f}" in picture.read_text()
    drawing = tmp_path / "experts.svg"
    assert run("experts", "--address", address, "--output", str(drawing)).exit_code == 0
    assert drawing.read_text().startswith("<svg")


def test_json_says_the_same(address):
    values = json.loads(run("experts", "--address", address, "--json").output)
    assert values["shards"] == ["a", "b", "c"]
    assert [layer["layer"] for layer in values["layers"]] == [1, 2]
    assert values["layers"][0]["homes"][0] == {"shards": [0]}


def test_a_plan_is_shown_kept_and_acted_upon(address, coordinator, tmp_path: Path):
    plan = tmp_path / "plan.json"
    done = run("experts", "plan", "--address", address, "--output", str(plan))
    assert done.exit_code == 0 and "not known before a first move" in done.output
    assert coordinator.rebalance.placement.epoch == 1, "a plan moves nothing"
    wanted = coordinator.rebalance.forecast().homes
    assert run("experts", "move", str(plan), "--address", address).exit_code == 0
    again = run("experts", "move", str(plan), "--address", address)
    assert again.exit_code == 1 and "experts are on their way" in again.output
    coordinator.settle(3.0)
    assert coordinator.rebalance.in_force.homes == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"layers": [], "placement_epoch": 1}', "the plan is for another model"),
        ("[]", "this is not a plan of experts"),
        ("no json", "this is not a plan of experts"),
        ('{"surprise": 1}', "this is not a plan of experts"),
    ],
)
def test_what_is_no_plan_is_refused(address, tmp_path: Path, text, words):
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    done = run("experts", "move", str(plan), "--address", address)
    assert done.exit_code == 1 and words in done.output


def test_a_plan_that_is_not_there_is_named(address):
    done = run("experts", "move", "nowhere.json", "--address", address)
    assert done.exit_code == 1 and "nowhere.json cannot be read" in done.output


def test_over_the_wire_plans_come_whole_and_errors_are_typed(coordinator):
    async def ask() -> None:
        async with served(coordinator) as address, Client(address) as client:
            assert list((await client.get_experts()).shards) == ["a", "b", "c"]
            plan = await client.plan_experts()
            assert read_plan(json.dumps(as_values(plan))) == plan
            with pytest.raises(InvalidRequest, match="homes"):
                broken = read_plan(json.dumps(as_values(plan)))
                broken.layers[0].homes[0].shards[:] = [7]
                await client.move_experts(broken.layers, broken.placement_epoch)
            with pytest.raises(InvalidRequest, match="the plan is for placement 9"):
                await client.move_experts(plan.layers, 9)
            await client.move_experts(plan.layers, plan.placement_epoch)
            with pytest.raises(NodeUnavailable) as caught:
                await client.plan_experts()
            assert caught.value.retry_after_s == 5.0

    asyncio.run(ask())


def test_colours_go_from_blue_over_grey_to_red():
    cold, even, hot = colour_of(0.0), colour_of(1.0), colour_of(9.0)
    assert cold[2] > cold[0] and len(set(even)) == 1 and hot[0] > hot[2]
