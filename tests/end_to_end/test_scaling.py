"""Pools that follow the load, and people: seen through the Ray dashboard's API, with no request harmed."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import pools
from cluster.client import Client
from cluster.membership import READY
from cluster.validation import RequestedGeneration, RequestedSampling
from tests.end_to_end.stage import one_by_one, tokens_of, wait_until

SMALL = Path("examples/trivium-small")
QUICK = {"enabled": True, "period_s": 0.5, "grow_pause_s": 2.0, "shrink_pause_s": 5.0}
LATENCIES = {"time_to_first_token_s": 0.4, "inter_token_s": 60.0}  # decode grows by its pages alone
GROWTH_S, SHRINK_S = 60.0, 90.0
CHECKED_COUNT = 3


def greedy(tokens_max: int) -> RequestedSampling:
    return RequestedSampling(temperature=0.0, tokens_max=tokens_max, ignore_eos=True)


def prompt(random_: random.Random, length: int) -> tuple[int, ...]:
    return tuple(random_.randrange(10, 1000) for _ in range(length))


class Watch:
    """Notes every count that the dashboard's API shows, until it is left."""

    def __init__(self, stage):
        self.seen: list[dict[str, int]] = []
        self.ready_counts: dict[str, int] = {}
        self._stage = stage
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            self.seen.append(self._stage.targets())
            self.ready_counts = {kind: ready_count(kind) for kind in ("prefill", "decode")}

    def sees_two(self, kind: str) -> bool:
        return self.ready_counts.get(kind) == 2

    def most(self, pool: str) -> int:
        return max((counts[pool] for counts in self.seen), default=0)


async def burst(
    address: str, make: Callable[[], RequestedGeneration], gap_s: float, enough: Callable[[], bool]
) -> list[tuple[RequestedGeneration, list[int]]]:
    """Send new requests at a pace until `enough` says so; each one with its tokens."""
    async with Client(address) as client:
        running, requests, end_s = [], [], time.monotonic() + GROWTH_S
        while time.monotonic() < end_s and not enough():
            requests.append(make())
            running.append(asyncio.create_task(tokens_of(client, requests[-1])))
            await asyncio.sleep(gap_s)
        return list(zip(requests, await asyncio.gather(*running), strict=True))


def assert_as_if_alone(address: str, answered: list[tuple[RequestedGeneration, list[int]]]) -> None:
    """Some requests of a burst give the same tokens when they are sent alone."""
    some = random.Random(len(answered)).sample(answered, CHECKED_COUNT)
    assert one_by_one(address, [request for request, _ in some]) == [tokens for _, tokens in some]
    assert all(len(tokens) == request.sampling.tokens_max for request, tokens in answered)


def ready_count(kind: str) -> int:
    return sum(member.state == READY for member in pools.view().of_kind(kind))


@pytest.mark.timeout(400)
def test_a_burst_makes_pools_grow_separately_and_come_down_again(stage):
    address = stage.cluster(
        SMALL,
        autoscaler={**QUICK, **LATENCIES},
        prefill={"count_max": 2, "latents_bytes": "64MiB"},
        decode={"count_max": 2, "latents_bytes": "64MiB"},
    )
    random_ = random.Random(5)

    def long_prompt() -> RequestedGeneration:
        return RequestedGeneration(token_ids=prompt(random_, 600), sampling=greedy(2))

    def long_answer() -> RequestedGeneration:
        return RequestedGeneration(token_ids=prompt(random_, 40), sampling=greedy(500))

    assert stage.targets()["prefill"] == stage.targets()["decode"] == 1
    with Watch(stage) as watch:
        prompts = asyncio.run(burst(address, long_prompt, 0.06, lambda: watch.sees_two("prefill")))
    assert watch.most("prefill") == 2, "prompts waited, so there were more to read them"
    assert watch.most("experts") == 2
    with Watch(stage) as watch:
        answers = asyncio.run(burst(address, long_answer, 0.15, lambda: watch.sees_two("decode")))
    assert watch.most("decode") == 2, "pages were taken, so there were more to write"

    def is_small() -> bool:
        return (stage.targets()["prefill"], stage.targets()["decode"]) == (1, 1)

    assert wait_until(is_small, SHRINK_S)
    assert wait_until(lambda: (ready_count("prefill"), ready_count("decode")) == (1, 1), 30)
    assert_as_if_alone(address, prompts)
    assert_as_if_alone(address, answers)

    # a person's count holds, whatever the load says, until it is released
    stage.scale("decode", 2)
    assert wait_until(lambda: ready_count("decode") == 2, 60)
    end_s = time.monotonic() + 2.5 * QUICK["shrink_pause_s"]
    while time.monotonic() < end_s:
        assert stage.targets()["decode"] == 2
        time.sleep(0.5)
    told = {pool.kind: pool for pool in pools_of(address).pools}
    assert told["decode"].hold.count == 2
    assert "dashboard" in told["decode"].hold.by
    assert not told["prefill"].HasField("hold")
    asyncio.run(release(address, "decode"))
    assert wait_until(lambda: stage.targets()["decode"] == 1, SHRINK_S)
    reasons = [decision.reason for decision in pools_of(address).decisions]
    assert all(reasons)


def pools_of(address: str):
    """What the operators' service tells of pools."""

    async def ask():
        async with Client(address) as client:
            return await client.get_pools()

    return asyncio.run(ask())


async def release(address: str, kind: str) -> None:
    async with Client(address) as client:
        await client.release_pool(kind)
