"""Requests that are given up, at any moment, free everything and disturb nobody."""

import asyncio
import random

import grpc

from cluster.client import Client, Delta
from cluster.errors import DeadlinePassed
from cluster.events import RoutedRequest
from cluster.reference import Reference
from cluster.validation import RequestedGeneration, RequestedSampling
from decode.messages import SamplingParameters
from kernels.model.checkpoint import Checkpoint
from tests.checkpoints import random_prompt
from tests.end_to_end.stage import cluster_of, events_of, tokens_of, wait_until

NAME = "groups"
REQUESTS_COUNT = 64
TOKENS_MAX = 32


def pages_in_use(address: str) -> dict[str, int]:
    """Leased pages by node, and what does not add up."""
    nodes = [node for node in cluster_of(address).nodes if node.pages_total_count]
    for node in nodes:
        counts = (node.pages_free_count, node.pages_cached_count, node.pages_leased_count)
        assert sum(counts) == node.pages_total_count, f"{node.name}: {counts} of {node.pages_total_count}"
    return {node.name: node.pages_leased_count for node in nodes if node.pages_leased_count}


async def maybe_cancelled(
    client: Client, request: RequestedGeneration, after_s: float | None
) -> list[int] | None:
    """A request's tokens, or None if it was given up after a while."""
    try:
        return await asyncio.wait_for(tokens_of(client, request), after_s)
    except TimeoutError:
        return None


def test_a_third_cancelled_at_random_moments(stage, checkpoint):
    chance = random.Random(11)
    folder = checkpoint(NAME)
    address = stage.cluster(folder)
    lengths = [chance.choice((1, 20, 64, 130, 300, 500)) for _ in range(REQUESTS_COUNT)]
    prompts = [tuple(random_prompt(f"cancel {index}", count)) for index, count in enumerate(lengths)]
    given_up = set(chance.sample(range(REQUESTS_COUNT), REQUESTS_COUNT // 3))
    sampling = RequestedSampling(temperature=0.0, tokens_max=TOKENS_MAX, ignore_eos=True)

    async def everything() -> list[list[int] | None]:
        async with Client(address) as client:
            return await asyncio.gather(
                *(
                    maybe_cancelled(
                        client,
                        RequestedGeneration(token_ids=prompt, sampling=sampling),
                        chance.uniform(0.0, 1.5) if index in given_up else None,
                    )
                    for index, prompt in enumerate(prompts)
                )
            )

    answers = asyncio.run(everything())
    assert wait_until(lambda: not pages_in_use(address), 2.0), pages_in_use(address)
    reference = Reference(Checkpoint(folder))
    parameters = SamplingParameters(temperature=0.0, tokens_max=TOKENS_MAX, ignore_eos=True)
    requests = [RoutedRequest(str(index), prompt, parameters) for index, prompt in enumerate(prompts)]
    truth = [generation.token_ids for generation in reference.generate(requests)]
    reference.close()
    finished = [index for index, answer in enumerate(answers) if answer is not None]
    assert set(range(REQUESTS_COUNT)) - given_up <= set(finished)
    assert [index for index in finished if answers[index] != truth[index]] == []


def test_a_deadline_frees_its_pages_within_a_second(stage, checkpoint):
    address = stage.cluster(checkpoint(NAME))
    prompt = tuple(random_prompt("deadline", 300))
    sampling = RequestedSampling(temperature=0.0, tokens_max=1500, ignore_eos=True)
    request = RequestedGeneration(token_ids=prompt, sampling=sampling)

    async def until_deadline() -> str:
        async with Client(address) as client:
            try:
                async for _ in client.generate(request, timeout_s=0.7):
                    pass
            except DeadlinePassed as error:
                return error.reason
        return "finished"

    assert asyncio.run(until_deadline()) == grpc.StatusCode.DEADLINE_EXCEEDED.name
    assert wait_until(lambda: not pages_in_use(address), 1.0), pages_in_use(address)


def test_a_stop_string_ends_a_request_everywhere(stage):
    address = stage.cluster("examples/trivium-small")
    greedy = RequestedSampling(temperature=0.0, tokens_max=40, ignore_eos=True)
    whole = "".join(
        event.text
        for event in events_of(address, RequestedGeneration(text="The place", sampling=greedy))
        if isinstance(event, Delta)
    )
    stop = whole[10:14]
    stopped = RequestedSampling(temperature=0.0, tokens_max=40, ignore_eos=True, stop_strings=(stop,))
    events = events_of(address, RequestedGeneration(text="The place", sampling=stopped))
    assert "".join(event.text for event in events if isinstance(event, Delta)) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop_string"
    assert wait_until(lambda: not pages_in_use(address), 1.0), pages_in_use(address)
