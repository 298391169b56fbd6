"""A shard's actor without Ray: what it says of itself, what it keeps while experts move, whom it asks."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import actors
from cluster.actors import ShardActor
from cluster.config import check_config
from cluster.place import Place
from cluster.view import DRAINING, READY, STARTING, View
from experts.messages import Homes, Placement, ShardAddress
from experts.placement import even_placement
from kernels.model.config import ModelConfig
from tests.cluster.served import FOLDER, SECRET, until
from tests.cluster.test_post import Coordinator

MODEL = ModelConfig.from_folder(FOLDER)


class Shard(ShardActor):
    """Ended by hand, as Serve does, and not again with the garbage."""

    drain = ShardActor.__del__

    def __del__(self) -> None:
        """Nothing: see `drain`."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch) -> Iterator[None]:
    """No waiting for others to notice, no lasting change of this process."""
    monkeypatch.setattr(actors, "QUIET_S", 0.01)
    monkeypatch.setattr(actors, "begin_logs", lambda *_: None)
    before_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before_s)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A cluster of this host alone."""
    return Place(check_config({"model": {"folder": str(FOLDER)}}, "test", Path.cwd()), SECRET, str(tmp_path))


@asynccontextmanager
async def acting(place: Place, coordinator: Coordinator) -> AsyncIterator[Shard]:
    """A shard until it is ended."""
    shard = Shard(place, coordinator)
    try:
        yield shard
    finally:
        await shard.drain()


def placed(*shards: Shard, epoch: int) -> Placement:
    """The even placement on some shards."""
    addresses = [
        ShardAddress(one.name, one.shard.address, weights_address=one.shard.weights_address) for one in shards
    ]
    layers_count, experts_count = len(MODEL.moe_layers), MODEL.routed_experts_count
    return even_placement(addresses, MODEL.dense_layers_count, layers_count, experts_count, epoch)


def told(*shards: Shard, placement: Placement, in_force: Placement | None = None) -> View:
    """A view in which every node goes by what is in force."""
    members = tuple(shard.describe() for shard in shards)
    return View(members, placement, in_force, in_force.epoch if in_force else 0)


def last_leaving(view: View) -> View:
    """The same, in which the last member is to leave."""
    *others, last = view.members
    return replace(view, members=(*others, replace(last, state=DRAINING)))


@asynccontextmanager
async def both_acting(place: Place) -> AsyncIterator[tuple[Shard, Shard, Placement]]:
    """Two shards, and the placement that gives each of them a half."""
    async with acting(place, Coordinator()) as one, acting(place, Coordinator()) as other:
        both = placed(one, other, epoch=1)
        for shard in (one, other):
            await shard.on_view(told(one, other, placement=both))
        yield one, other, both


def test_a_shard_starts_until_it_holds_experts(place):
    async def run() -> None:
        coordinator = Coordinator()
        async with acting(place, coordinator) as shard:
            assert shard.describe().state == STARTING
            whole = placed(shard, epoch=1)
            nothing = replace(whole, shards=(ShardAddress("other", "memory://other"), *whole.shards))
            await shard.on_view(told(shard, placement=nothing))
            assert (shard.describe().state, shard.shard.epoch) == (STARTING, 1)
            await shard.on_view(told(shard, placement=replace(whole, epoch=2)))
            assert shard.describe().state == READY
            assert coordinator.last(shard.name).report.epoch == 2, "it is told at once"
        assert coordinator.states(shard.name) == [STARTING, READY, DRAINING]

    asyncio.run(run())


def test_a_shard_that_stopped_computing_leaves(place):
    async def run() -> None:
        async with acting(place, Coordinator()) as shard:
            await shard.on_view(told(shard, placement=placed(shard, epoch=1)))
            await shard.check_health()
            shard.shard._stopping = True
            await until(lambda: not shard.shard.is_alive)
            assert shard.describe().state == DRAINING
            with pytest.raises(RuntimeError, match=shard.name):
                await shard.check_health()

    asyncio.run(run())


def test_on_a_way_of_many_steps_memory_is_had_for_one(place):
    """Each view that says that nodes have come as far as one step gives out the next."""

    async def run() -> None:
        async with acting(place, Coordinator()) as shard:
            others = (ShardAddress("other", "memory://other"), ShardAddress(shard.name, shard.shard.address))
            in_force = replace(placed(shard, epoch=1), shards=others, homes=swapped(0))
            await shard.on_view(told(shard, placement=in_force))
            before_count = shard.describe().report.experts_count
            for step in range(1, 5):
                placement = replace(in_force, epoch=step + 1, homes=swapped(step))
                await shard.on_view(told(shard, placement=placement, in_force=in_force))
                holding = shard.shard._holding
                assert holding.epoch == step + 1 and len(holding.experts) == before_count
                assert len(holding.leaving) == 1, "what the step before had left is gone"
                in_force = placement

    asyncio.run(run())


def swapped(count: int) -> Homes:
    """Even homes on two shards, of which so many experts of the first layer have changed places."""
    half = MODEL.routed_experts_count // 2
    swapped_layer = tuple(
        ((expert // half + (expert % half < count)) % 2,) for expert in range(MODEL.routed_experts_count)
    )
    even = tuple((expert // half,) for expert in range(MODEL.routed_experts_count))
    return (swapped_layer, *(even,) * (len(MODEL.moe_layers) - 1))


def test_what_a_leaving_shard_holds_comes_from_it(place):
    async def run() -> None:
        async with both_acting(place) as (stays, leaves, both):
            view = told(stays, leaves, placement=placed(stays, epoch=2), in_force=both)
            await stays.on_view(last_leaving(view))
            assert stays.describe().report.fetched_count == len(both.experts_of(leaves.name)) > 0

    asyncio.run(run())


def test_only_what_others_wait_for_is_urgent(place):
    async def run() -> None:
        async with both_acting(place) as (one, other, both):
            view = told(one, other, placement=replace(both, epoch=2), in_force=both)
            is_urgent = one._urgency(view)
            assert not is_urgent(), "experts only move"
            one.heartbeat.view = replace(view, placement=replace(both, epoch=3))
            assert is_urgent(), "another placement waits"
            one.heartbeat.view = View()
            assert not is_urgent(), "nobody has told anything else"
            one._is_leaving = True
            assert is_urgent(), "it is to go"
            one._is_leaving = False
            one._replicas_min = 2
            assert one._urgency(view)(), "of what shall be twice there is one"
            one._replicas_min = 1
            assert one._urgency(replace(view, placement_in_force=None))(), "the cluster begins"
            assert one._urgency(replace(view, members=view.members[:1]))(), "some experts are nowhere"
            assert one._urgency(last_leaving(view))(), "a shard is to leave"

    asyncio.run(run())


def test_who_computes_waits_for_no_other_thread_for_long(place):
    async def run() -> None:
        async with acting(place, Coordinator()):
            assert sys.getswitchinterval() == pytest.approx(actors.SWITCH_S)

    asyncio.run(run())
