"""Whatever the topology and the company, a request gets the same tokens."""

import random
from pathlib import Path

import pytest

from cluster.events import RoutedRequest
from cluster.reference import Reference
from cluster.validation import RequestedGeneration, RequestedSampling
from decode.messages import SamplingParameters
from kernels.model.checkpoint import Checkpoint
from tests.checkpoints import random_prompt
from tests.end_to_end.stage import all_tokens, one_by_one

NAME = "groups"
TOPOLOGIES = {
    "1P 1D 1E unix": {"experts": {"shards_count": 1}, "transport": {"scheme": "unix"}},
    "1P 1D 1E tcp": {"experts": {"shards_count": 1}, "transport": {"scheme": "tcp"}},
    "2P 2D 3E unix": {"prefill": {"count": 2}, "decode": {"count": 2}, "experts": {"shards_count": 3}},
    "2P 1D 3E tcp, two micro-batches": {
        "prefill": {"count": 2, "micro_batches": 2},
        "decode": {"micro_batches": 2},  # one node, whose steps then have the sixteen requests that are split
        "experts": {"shards_count": 3},
        "transport": {"scheme": "tcp"},
    },
    "2E, prefill and decode in one process": {"prefill": {"count": 0}, "decode": {"reads_prompts": True}},
}
ALONE_COUNT = 4
TOGETHER_COUNT = 32
PACKED_COUNT = 12


def prompts() -> list[tuple[int, ...]]:
    """Prompts of many lengths, the first ones also sent alone."""
    lengths = [1, 63, 65, 300, *(random.Random(7).randint(1, 400) for _ in range(TOGETHER_COUNT))]
    return [tuple(random_prompt(f"{NAME} {index}", count)) for index, count in enumerate(lengths)]


def requested(index: int, prompt: tuple[int, ...]) -> RequestedGeneration:
    """Greedy and sampled in turn."""
    greedy = index % 2 == 0
    sampling = RequestedSampling(
        temperature=0.0 if greedy else 0.9,
        top_p=None if greedy else 0.95,
        seed=index,
        tokens_max=24,
        ignore_eos=True,
    )
    return RequestedGeneration(token_ids=prompt, sampling=sampling)


def answers_alone(folder: Path, packs_latents: bool) -> list[list[int]]:
    """Tokens of one process with LocalExperts, each request alone."""
    reference = Reference(Checkpoint(folder), packs_latents=packs_latents)
    answers = []
    for index, prompt in enumerate(prompts()):
        asked = requested(index, prompt).sampling
        sampling = SamplingParameters(
            temperature=asked.temperature,
            top_p=asked.top_p or 1.0,
            seed=index,
            tokens_max=24,
            ignore_eos=True,
        )
        answers.append(reference.generate([RoutedRequest(str(index), prompt, sampling)])[0].token_ids)
    reference.close()
    return answers


@pytest.fixture(scope="module")
def truth(checkpoint) -> list[list[int]]:
    """What every topology must answer."""
    return answers_alone(checkpoint(NAME), packs_latents=False)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_same_tokens_alone_and_among_others(topology, stage, checkpoint, truth):
    requests = [requested(index, prompt) for index, prompt in enumerate(prompts())]
    address = stage.cluster(checkpoint(NAME), **TOPOLOGIES[topology])
    assert one_by_one(address, requests[:ALONE_COUNT]) == truth[:ALONE_COUNT]
    assert_same(all_tokens(address, requests), truth)


def test_latents_kept_and_sent_as_fp8_give_the_tokens_of_one_process_that_does_so(stage, checkpoint, truth):
    folder = checkpoint(NAME)
    requests = [requested(index, prompt) for index, prompt in enumerate(prompts()[:PACKED_COUNT])]
    address = stage.cluster(folder, model={"folder": str(folder), "latents": "fp8"}, decode={"count": 2})
    expected = answers_alone(folder, packs_latents=True)[:PACKED_COUNT]
    assert expected != truth[:PACKED_COUNT], "FP8 changes no token: this test shows nothing"
    assert_same(all_tokens(address, requests), expected)


def assert_same(tokens: list[list[int]], expected: list[list[int]]) -> None:
    """All requests have the tokens that are expected of them."""
    pairs = zip(tokens, expected, strict=True)
    wrong = [index for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    assert not wrong, f"requests {wrong} differ"
