"""Latent attention against transformers' module, and its two forms against each other."""

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from kernels.model.attention import LatentAttention, Rotation
from kernels.model.config import ModelConfig
from kernels.model.layers import rope_frequencies, rope_scale
from kernels.ops.rotary import rotation
from tests.kernels.model.models import YARN, compressed, configs, draw_weights
from tests.kernels.ops.rows import THREADS, assert_rows_keep_their_bits, threads

ATTENTION_TOLERANCE = 1e-5  # relative to the largest number of the output
FORMS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2}
VARIANTS = {
    "v3": ("deepseek_v3", {}),
    "no q-LoRA": ("deepseek_v3", {"q_lora_rank": None}),
    "biases": ("deepseek_v3", {"attention_bias": True}),
    "biases, no q-LoRA": ("deepseek_v3", {"attention_bias": True, "q_lora_rank": None}),
    "halves turned": ("deepseek_v3", {"rope_interleave": False}),
    "YaRN": ("deepseek_v3", {"rope_parameters": YARN}),
    "YaRN, two mscales": ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}),
    "v2": ("deepseek_v2", {}),
    "v2, biases": ("deepseek_v2", {"attention_bias": True}),
    "v2, no q-LoRA, YaRN": ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN}),
    "norms of their own epsilon": ("deepseek_v3", {"rms_norm_eps": 0.5}),
}
TOKENS = 150


def turns(config: ModelConfig, tokens_count: int) -> Rotation:
    """The rotation of a prompt's first tokens."""
    frequencies = rope_frequencies(config.rope, config.qk_rope_head_dim)
    return Rotation(*rotation(torch.arange(tokens_count), frequencies, rope_scale(config.rope)))


def drawn_attention(variant: str, dtype: torch.dtype = torch.float32):
    """Transformers' attention with random weights, its config, and ours with the same."""
    family, values = VARIANTS[variant]
    theirs_config, config = configs(family, **values)
    theirs = (DeepseekV2Attention if family == "deepseek_v2" else DeepseekV3Attention)(theirs_config, 0)
    draw_weights(theirs)
    weights = {
        f"model.layers.0.self_attn.{name}": weight.to(dtype) for name, weight in theirs.state_dict().items()
    }
    return theirs, theirs_config, LatentAttention(config, weights, 0)


def prefilled(
    attention: LatentAttention, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, queries and latents of a prompt that comes whole."""
    queries, latents = compressed(attention, hidden, turns(attention.config, len(hidden)))
    return attention.project(attention.expand(queries, latents)), queries, latents


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_is_that_of_transformers(variant):
    theirs, theirs_config, attention = drawn_attention(variant)
    embedding = DeepseekV2RotaryEmbedding if "v2" in variant else DeepseekV3RotaryEmbedding
    hidden = torch.randn(TOKENS, 48)
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        positions = embedding(theirs_config)(hidden[None], torch.arange(TOKENS)[None])
        expected, _ = theirs(hidden[None], position_embeddings=positions, attention_mask=mask)
        result, _, _ = prefilled(attention, hidden)
    assert (result - expected[0]).abs().max() < ATTENTION_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("dtype", FORMS_TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", ["v3", "no q-LoRA", "biases", "halves turned", "YaRN", "v2"])
def test_absorbed_is_expanded(variant, dtype):
    """Each token of a prompt decoded over its own context gives what the whole prompt gives."""
    _, _, attention = drawn_attention(variant, dtype)
    hidden = torch.randn(TOKENS, 48).to(dtype)
    with torch.inference_mode():
        expanded, queries, latents = prefilled(attention, hidden)
        one_page, lengths = (
            torch.zeros(TOKENS, 1, dtype=torch.int32),
            torch.arange(TOKENS, dtype=torch.int32) + 1,
        )
        absorbed = attention.project(attention.absorb(queries, latents[None], one_page, lengths))
    assert absorbed.dtype == expanded.dtype == latents.dtype == dtype
    assert latents.shape == (TOKENS, attention.config.latent_dim)
    assert (absorbed - expanded).abs().max() < FORMS_TOLERANCE[dtype] * expanded.abs().max()


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["v3", "biases, no q-LoRA"])
def test_a_token_leaves_the_same_latent_in_any_batch(variant, dtype, threads_count):
    _, _, attention = drawn_attention(variant, dtype)
    hidden, whole = torch.randn(130, 48).to(dtype), turns(attention.config, 130)

    def of_rows(some: slice) -> torch.Tensor:
        rotation = Rotation(whole.cosines[some], whole.sines[some])
        queries, latents = compressed(attention, hidden[some], rotation)
        return torch.cat([queries.flatten(1), latents], dim=1)

    with torch.inference_mode(), threads(threads_count):
        assert_rows_keep_their_bits(of_rows)


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_decoded_to_the_same_bits_in_any_batch(dtype, threads_count):
    _, _, attention = drawn_attention("v3", dtype)
    queries, latents = torch.randn(20, 3, 24).to(dtype), torch.randn(20, 300, 40).to(dtype)
    pages, lengths = torch.randperm(20).to(torch.int32)[:, None], torch.arange(20, dtype=torch.int32) * 13 + 1
    with torch.inference_mode(), threads(threads_count):
        assert_rows_keep_their_bits(
            lambda some: attention.project(
                attention.absorb(queries[some], latents, pages[some], lengths[some])
            ),
            20,
        )


def test_chunks_at_page_borders_have_the_bits_of_the_whole():
    _, _, attention = drawn_attention("v3")
    hidden = torch.randn(TOKENS, 48)
    with torch.inference_mode():
        whole, queries, latents = prefilled(attention, hidden)
        chunks = [
            attention.project(attention.expand(queries[begin:end], latents[:end]))
            for begin, end in ((0, 64), (64, 128), (128, TOKENS))
        ]
    assert torch.equal(torch.cat(chunks), whole)
