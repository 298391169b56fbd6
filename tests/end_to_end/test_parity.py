"""Through Ray and gRPC a cluster gives the tokens that transformers gives."""

import pytest

from cluster.validation import RequestedGeneration
from tests.checkpoints import NAMES, random_prompt, reference_tokens
from tests.end_to_end.stage import GREEDY_64, all_tokens

PROMPT_TOKENS = (1, 63, 64, 65, 700)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name, stage, checkpoint):
    folder = checkpoint(name)
    prompts = [random_prompt(name, count) for count in PROMPT_TOKENS]
    address = stage.cluster(folder)
    ours = all_tokens(
        address, [RequestedGeneration(token_ids=tuple(ids), sampling=GREEDY_64) for ids in prompts]
    )
    for count, prompt, tokens in zip(PROMPT_TOKENS, prompts, ours, strict=True):
        assert tokens == list(reference_tokens(folder, prompt, 64)), f"{name}, prompt of {count} tokens"
