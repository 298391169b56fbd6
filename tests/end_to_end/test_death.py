"""An actor that is killed in the middle of requests alters no token; only a gateway's streams end with it."""

import asyncio
import itertools
import os
import signal
from contextlib import AsyncExitStack

import pytest

from cluster.client import Client, Delta
from cluster.errors import NodeUnavailable
from cluster.validation import RequestedGeneration, RequestedSampling
from tests.checkpoints import random_prompt
from tests.end_to_end.stage import all_tokens, cluster_of, wait_until
from tests.processes import MARK, processes_left

NAME = "groups"
REQUESTS_COUNT = 12
SAMPLING = RequestedSampling(temperature=0.8, seed=5, tokens_max=100, ignore_eos=True)


def requests(salt: str) -> list[RequestedGeneration]:
    """Prompts that no cache knows yet."""
    prompts = [random_prompt(f"{salt} {index}", 20 + 30 * index) for index in range(REQUESTS_COUNT)]
    return [RequestedGeneration(token_ids=tuple(prompt), sampling=SAMPLING) for prompt in prompts]


async def with_a_death(
    addresses: list[str], asked: list[RequestedGeneration], pid: int
) -> list[list[int] | BaseException]:
    """What becomes of requests sent to gateways in turn, a process being killed when one has some tokens."""
    some = asyncio.Event()

    async def tokens_of(client: Client, request: RequestedGeneration) -> list[int]:
        tokens: list[int] = []
        async for event in client.generate(request, timeout_s=120):
            if isinstance(event, Delta):
                tokens.extend(event.token_ids)
                if len(tokens) > 5:
                    some.set()
        return tokens

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(address)) for address in addresses]
        pairs = zip(itertools.cycle(clients), asked, strict=False)
        work = [asyncio.create_task(tokens_of(client, request)) for client, request in pairs]
        await some.wait()
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*work, return_exceptions=True)


@pytest.mark.parametrize("kind", ["decode", "prefill", "experts"])
def test_kill_9(kind, stage, checkpoint):
    address = stage.cluster(checkpoint(NAME))
    asked = requests(kind)
    undisturbed = all_tokens(address, asked)
    address = stage.cluster(checkpoint(NAME))
    victim = stage.view.of_kind(kind)[0]
    assert asyncio.run(with_a_death([address], asked, victim.pid)) == undisturbed


def test_kill_9_of_the_coordinator_and_then_of_one_of_two_gateways(stage, checkpoint):
    stage.cluster(checkpoint(NAME), gateway={"port": 0, "count": 2})
    gateways = stage.view.of_kind("gateway")
    addresses = [gateway.address for gateway in gateways]
    asked = requests("gateways")[:6]
    undisturbed = all_tokens(addresses[0], asked)
    assert asyncio.run(with_a_death(addresses, asked, coordinator_pid())) == undisturbed
    came = asyncio.run(with_a_death(addresses, asked, gateways[0].pid))
    assert all(isinstance(one, NodeUnavailable) for one in came[::2]), came[::2]
    assert {one.reason for one in came[::2]} == {"STREAM_BROKEN"}
    assert came[1::2] == undisturbed[1::2]
    assert wait_until(lambda: not pages_leased_count(addresses[1]), 20.0), (
        "pages of streams that broke are free"
    )
    assert all_tokens(addresses[1], asked[:1]) == undisturbed[:1]


def coordinator_pid() -> int:
    """Of the one that this run has started."""
    commands = processes_left(os.environ[MARK])
    [pid] = [pid for pid, command in commands.items() if ":coordinator" in command]
    return pid


def pages_leased_count(address: str) -> int:
    """Pages that somebody holds, as a gateway tells."""
    return sum(node.pages_leased_count for node in cluster_of(address).nodes)
