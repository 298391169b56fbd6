"""An actor that is killed in the middle of requests loses none of them and alters no token."""

import asyncio
import os
import signal

import pytest

from cluster.client import Client, Delta
from cluster.validation import RequestedGeneration, RequestedSampling
from tests.checkpoints import random_prompt
from tests.end_to_end.stage import all_tokens

NAME = "groups"
REQUESTS_COUNT = 12
SAMPLING = RequestedSampling(temperature=0.8, seed=5, tokens_max=100, ignore_eos=True)


def requests(salt: str) -> list[RequestedGeneration]:
    """Prompts that no cache knows yet."""
    prompts = [random_prompt(f"{salt} {index}", 20 + 30 * index) for index in range(REQUESTS_COUNT)]
    return [RequestedGeneration(token_ids=tuple(prompt), sampling=SAMPLING) for prompt in prompts]


async def with_a_death(address: str, asked: list[RequestedGeneration], pid: int) -> list[list[int]]:
    """Tokens of requests sent together, a process being killed when the first of them has some."""
    some = asyncio.Event()

    async def tokens_of(client: Client, request: RequestedGeneration) -> list[int]:
        tokens: list[int] = []
        async for event in client.generate(request, timeout_s=120):
            if isinstance(event, Delta):
                tokens.extend(event.token_ids)
                if len(tokens) > 5:
                    some.set()
        return tokens

    async with Client(address) as client:
        work = [asyncio.create_task(tokens_of(client, request)) for request in asked]
        await some.wait()
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*work)


@pytest.mark.parametrize("kind", ["decode", "prefill", "experts"])
def test_kill_9(kind, stage, checkpoint):
    address = stage.cluster(checkpoint(NAME))
    asked = requests(kind)
    undisturbed = all_tokens(address, asked)
    address = stage.cluster(checkpoint(NAME))
    victim = stage.view.of_kind(kind)[0]
    assert asyncio.run(with_a_death(address, asked, victim.pid)) == undisturbed
