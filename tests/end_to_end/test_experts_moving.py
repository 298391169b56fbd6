"""Experts move, shards come, go and die under load: no request fails and no token is another."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

from cluster import pools
from cluster.client import Client
from cluster.errors import NodeUnavailable
from cluster.proto import trivium_pb2
from cluster.validation import RequestedGeneration, RequestedSampling
from tests.checkpoints import random_prompt
from tests.end_to_end.stage import all_tokens, tokens_of, wait_until

NAME = "groups"
STREAMS_COUNT = 32
MOVES_COUNT = 10
LOAD = {"rebalance": False}  # experts move only when a test says so
MOVED_S = 30.0


def requests(salt: str, count: int = STREAMS_COUNT) -> list[RequestedGeneration]:
    """Prompts of many lengths, greedy and seeded."""
    asked = []
    for index in range(count):
        sampling = RequestedSampling(
            temperature=0.9 * (index % 2), seed=index, tokens_max=30 + index, ignore_eos=True
        )
        prompt = random_prompt(f"{salt} {index}", 5 + 7 * index)
        asked.append(RequestedGeneration(token_ids=tuple(prompt), sampling=sampling))
    return asked


async def under_load(
    address: str, asked: list[RequestedGeneration], disturb: Callable[[Client], Awaitable[None]]
) -> AsyncIterator[list[list[int]]]:
    """The tokens of all requests, again and again until the disturbance is over, and once more."""
    async with Client(address) as client:
        disturbance = asyncio.create_task(disturb(client))
        over = False
        while not over:
            over = disturbance.done()
            yield await asyncio.gather(*(tokens_of(client, request) for request in asked))
        await disturbance


async def all_the_same(
    address: str,
    asked: list[RequestedGeneration],
    expected: list[list[int]],
    disturb: Callable[[Client], Awaitable[None]],
) -> int:
    """How often all requests ran, each time with the tokens expected."""
    rounds_count = 0
    async for tokens in under_load(address, asked, disturb):
        assert tokens == expected
        rounds_count += 1
    return rounds_count


def shuffled_homes(experts: trivium_pb2.GetExpertsResponse, chance: random.Random) -> list:
    """Other homes for every expert, of some on two shards."""
    shards_count = len(experts.shards)
    layers = []
    for layer in experts.layers:
        homes = [sorted(chance.sample(range(shards_count), chance.choice([1, 1, 2]))) for _ in layer.homes]
        layers.append(
            trivium_pb2.LayerOfExperts(
                layer=layer.layer, homes=[trivium_pb2.Homes(shards=shards) for shards in homes]
            )
        )
    return layers


async def moved(client: Client, chance: random.Random) -> None:
    """Move experts and wait until they have arrived."""
    while True:
        experts = await client.get_experts()
        layers = shuffled_homes(experts, chance)
        try:
            await client.move_experts(layers, experts.placement_epoch)
            break
        except NodeUnavailable:  # the move before is not over
            await asyncio.sleep(0.05)
    while (experts := await client.get_experts()).is_moving:
        await asyncio.sleep(0.05)
    assert [list(home.shards) for home in experts.layers[0].homes] == [
        list(home.shards) for home in layers[0].homes
    ]


def shards_in_force() -> int:
    """How many shards the placement in force names."""
    placement = pools.view().placement_in_force
    return len(placement.shards) if placement else 0


def test_ten_moves_and_a_shard_more_and_less(stage, checkpoint):
    address = stage.cluster(checkpoint(NAME), experts=LOAD)
    asked = requests("moving")
    expected = all_tokens(address, asked)
    chance = random.Random(3)

    async def disturb(client: Client) -> None:
        epoch = (await client.get_experts()).placement_epoch
        for _ in range(MOVES_COUNT):
            await moved(client, chance)
        for count in (3, 2):
            await asyncio.to_thread(stage.scale, "experts", count)
            assert await asyncio.to_thread(
                wait_until, lambda count=count: shards_in_force() == count, MOVED_S
            )
        assert (await client.get_experts()).placement_epoch >= epoch + MOVES_COUNT + 2

    assert asyncio.run(all_the_same(address, asked, expected, disturb)) > 1


def test_one_of_three_shards_dies_and_nobody_waits_for_it(stage, checkpoint):
    address = stage.cluster(checkpoint(NAME), experts={"shards_count": 3, "replicas_min": 2})
    asked = requests("dying", 16)
    expected = all_tokens(address, asked)
    address = stage.cluster(checkpoint(NAME), experts={"shards_count": 3, "replicas_min": 2})
    placement = pools.view().placement_in_force
    assert all(len(home) >= 2 for homes in placement.homes for home in homes)
    victim = stage.view.of_kind("experts")[0]

    async def disturb(client: Client) -> None:
        await asyncio.sleep(0.5)
        os.kill(victim.pid, signal.SIGKILL)
        gone = await asyncio.to_thread(
            wait_until,
            lambda: victim.name not in {s.name for s in pools.view().placement_in_force.shards},
            MOVED_S,
        )
        assert gone, "survivors take over"

    assert asyncio.run(all_the_same(address, asked, expected, disturb)) > 1


def test_a_skewed_load_makes_experts_move_by_themselves(stage, checkpoint):
    """One prompt again and again is a skewed load; with spare replicas it can be spread better."""
    eager = {
        "spare_replicas": 2,
        "rebalance_pause_s": 1.0,
        "rebalance_slowness_max": 1.01,
        "rebalance_step_bytes": "16KiB",
    }
    address = stage.cluster(checkpoint(NAME), experts=eager)
    asked = requests("same", 1) * 16
    expected = all_tokens(address, asked)

    async def disturb(client: Client) -> None:
        end_s = asyncio.get_running_loop().time() + 4 * MOVED_S
        while not (await client.get_experts()).rebalances_count:
            assert asyncio.get_running_loop().time() < end_s, "nothing moved"
            await asyncio.sleep(0.2)

    asyncio.run(all_the_same(address, asked, expected, disturb))
