"""Latents kept and sent as FP8: the same tokens however the prompt was cut, in a good half of the bytes."""

import pytest

from kernels.ops.fp8_sizes import packed_bytes
from tests.checkpoints import random_prompt
from tests.fixtures import CHECKPOINT, Stage

LENGTHS = (200, 70, 3)


def generate(stage: Stage, *lengths: int) -> list[list[int]]:
    """Tokens of prompts that run together."""
    for length in lengths:
        stage.gateway.ask(str(length), random_prompt(CHECKPOINT, length))
    stage.settle()
    return [stage.gateway.tokens(str(length)) for length in lengths]


@pytest.mark.parametrize("step_tokens_max", [64, 256])
def test_a_request_has_the_same_tokens_alone_in_company_and_in_chunks(transformer, step_tokens_max):
    alone = []
    for length in LENGTHS:
        stage = Stage(transformer, packs_latents=True)
        alone += generate(stage, length)
        stage.close()
    stage = Stage(transformer, packs_latents=True, step_tokens_max=step_tokens_max)
    assert generate(stage, *LENGTHS) == alone
    config = transformer.config
    row_bytes = packed_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    sent_bytes = stage.prefill.report().latents_bytes
    assert sent_bytes == sum(LENGTHS) * config.layers_count * row_bytes == stage.decode.latents_bytes
    stage.close()


def test_another_layout_than_the_inboxs_is_refused(transformer):
    stage, other = Stage(transformer), Stage(transformer, packs_latents=True)
    stage.prefill.cache = other.prefill.cache
    stage.prefill.prefill_step.cache = stage.prefill.cache
    stage.gateway.ask("odd", random_prompt(CHECKPOINT, 5))
    stage.settle()
    assert stage.decode.inbox.refused_count > 0
    assert len(stage.gateway.tokens("odd")) == 1, "no more than the token that prefill gives"
    stage.close()
    other.close()
