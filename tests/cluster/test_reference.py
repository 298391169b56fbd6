"""The reference engine against transformers, on a checkpoint of every shape, and against itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.events import RoutedRequest
from cluster.reference import Generation, Reference, RequestRefused
from decode.messages import SamplingParameters
from kernels.model.checkpoint import Checkpoint
from tests.checkpoints import NAMES, build, random_prompt, reference_logits

PROMPT_TOKENS = (1, 63, 64, 65, 700)
TOKENS_COUNT = 64
LOGITS_TOLERANCE = 1e-3  # of the largest logit of the row
GREEDY = SamplingParameters(temperature=0.0, tokens_max=TOKENS_COUNT, ignore_eos=True)
BRIEF = SamplingParameters(temperature=0.0, tokens_max=12, ignore_eos=True)
BFLOAT16_NAMES = ("groups", "v2_gate", "fp8")


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    """Each checkpoint in turn."""
    return request.param


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Builds checkpoints by name, each once in a run whoever asks."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"shared-{name}"
        return path if path.exists() else build(name, path)

    return folder


@pytest.fixture(scope="module")
def reference(folder_of, name) -> Iterator[Reference]:
    """The engine in float32."""
    engine = Reference(Checkpoint(folder_of(name)))
    yield engine
    engine.close()


def generate(
    engine: Reference, prompts: list[list[int]], sampling: SamplingParameters = GREEDY
) -> list[Generation]:
    """What comes of prompts that are asked for together."""
    requests = [RoutedRequest(f"request-{i}", tuple(prompt), sampling) for i, prompt in enumerate(prompts)]
    return engine.generate(requests)


def tokens_of(
    engine: Reference, prompts: list[list[int]], sampling: SamplingParameters = GREEDY
) -> list[list[int]]:
    """Their tokens."""
    return [generation.token_ids for generation in generate(engine, prompts, sampling)]


@pytest.fixture(scope="module")
def prompts(name) -> list[list[int]]:
    """One prompt of each length."""
    return [random_prompt(name, tokens_count) for tokens_count in PROMPT_TOKENS]


@pytest.fixture(scope="module")
def together(reference, prompts) -> list[list[int]]:
    """Greedy tokens of all prompts at once."""
    return tokens_of(reference, prompts)


@pytest.fixture(scope="module")
def expected_logits(folder_of, name, prompts, together) -> list[torch.Tensor]:
    """Transformers' logits after each token of prompt and output, the last one aside."""
    pairs = zip(prompts, together, strict=True)
    return [reference_logits(folder_of(name), prompt + tokens[:-1]) for prompt, tokens in pairs]


def test_tokens_are_those_of_transformers(prompts, together, expected_logits):
    """Each token is the best by transformers after the same beginning: so both go the same way."""
    for prompt, tokens, logits in zip(prompts, together, expected_logits, strict=True):
        assert len(tokens) == TOKENS_COUNT
        assert tokens == logits[len(prompt) - 1 :].argmax(dim=-1).tolist(), f"prompt of {len(prompt)}"


def test_logits_are_those_of_transformers(reference, prompts, together, expected_logits):
    worst = {}
    for prompt, tokens, logits in zip(prompts, together, expected_logits, strict=True):
        ours = reference.logits(prompt + tokens[:-1])
        error = (ours - logits).abs().amax(dim=-1) / logits.abs().amax(dim=-1)
        worst[len(prompt)] = float(error.max())
    assert max(worst.values()) < LOGITS_TOLERANCE, f"worst relative error by prompt length: {worst}"


def test_tokens_are_the_same_alone_and_together(reference, prompts, together):
    assert [tokens_of(reference, [prompt])[0] for prompt in prompts] == together


def test_a_known_beginning_is_not_computed_again(reference, name):
    prompt = random_prompt(name, 450)
    [first] = generate(reference, [prompt], BRIEF)
    [second] = generate(reference, [prompt], BRIEF)
    assert (first.cached_tokens_count, second.cached_tokens_count) == (0, 448)
    assert second.token_ids == first.token_ids
    [longer] = generate(reference, [prompt[:200] + prompt[:100]], BRIEF)
    assert longer.cached_tokens_count == 192


def test_draws_depend_on_seed_and_company_changes_nothing(reference, prompts):
    drawn = SamplingParameters(temperature=0.8, top_p=0.95, seed=11, tokens_max=16, ignore_eos=True)
    other = SamplingParameters(temperature=0.8, top_p=0.95, seed=12, tokens_max=16, ignore_eos=True)
    first = tokens_of(reference, prompts[:4], drawn)
    assert tokens_of(reference, prompts[:4], drawn) == first
    assert [tokens_of(reference, [prompt], drawn)[0] for prompt in prompts[:4]] == first
    assert tokens_of(reference, prompts[:4], other) != first


def test_pages_are_all_free_or_cached_afterwards(reference, together):
    for node in (reference.prefill, reference.decode):
        report = node.report()
        assert report.pages_leased_count == 0
        assert report.pages_free_count + report.pages_cached_count == report.pages_total_count


@pytest.mark.parametrize("other", BFLOAT16_NAMES)
def test_bfloat16_runs_and_company_changes_nothing(folder_of, other):
    engine = Reference(Checkpoint(folder_of(other)), torch.bfloat16)
    prompts = [random_prompt(other, tokens_count) for tokens_count in (1, 65, 130)]
    tokens = tokens_of(engine, prompts)
    assert all(len(set(some)) > 8 for some in tokens), "the same few tokens over and over"
    assert [tokens_of(engine, [prompt])[0] for prompt in prompts] == tokens
    logits = engine.logits(prompts[2])
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    engine.close()


def test_tokens_are_told_as_they_come_and_add_up(folder_of):
    engine = Reference(Checkpoint(folder_of("groups")))
    told: list[int] = []
    request = RoutedRequest("one", (5, 6, 7), GREEDY)
    [generation] = engine.generate([request], lambda _, token_ids: told.extend(token_ids))
    assert told == generation.token_ids and generation.finish_reason == "length"
    engine.close()


def test_a_request_that_can_never_fit_is_refused(folder_of):
    checkpoint = Checkpoint(folder_of("groups"))
    page_bytes = checkpoint.config.layers_count * 64 * checkpoint.config.latent_dim * 4
    engine = Reference(checkpoint, latents_bytes=2 * page_bytes)
    with pytest.raises(RequestRefused):
        generate(engine, [random_prompt("groups", 300)])
    engine.close()
