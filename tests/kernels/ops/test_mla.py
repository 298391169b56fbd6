"""Attention's two forms against attention written out in double precision; what is unused is poisoned."""

import pytest
import torch

from kernels.ops.mla_decode import mla_decode
from kernels.ops.mla_prefill import TILE_TOKENS, mla_prefill
from tests.kernels.ops.rows import THREADS, threads

SCORES_TOLERANCE = 1e-6  # scores pass through float32 on their way to the softmax
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 3e-2
HEADS, QK, V = 3, 24, 16
VALUE, LATENT = 32, 40
SCALE = 0.2


def naive(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last `queries [chunk, heads, qk]`, token by token in double precision."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    before = len(keys) - len(queries)
    rows = []
    for token, query in enumerate(queries):
        end = before + token + 1
        weights = (torch.einsum("hd,thd->ht", query, keys[:end]) * SCALE).softmax(dim=-1)
        rows.append(torch.einsum("ht,thd->hd", weights, values[:end]))
    return torch.stack(rows)


def drawn_prompt(tokens_count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries, keys and values of one prompt, values being a view as the model makes them."""
    wide = torch.randn(tokens_count, HEADS, QK + V).to(dtype)
    return [torch.randn(tokens_count, HEADS, QK).to(dtype), *wide.split([QK, V], dim=-1)]


def naive_decode(queries: torch.Tensor, latents: torch.Tensor, contexts: list) -> torch.Tensor:
    """One query token a request over its own latents, in double precision."""
    rows = []
    for query, slots in zip(queries.double(), contexts, strict=True):
        context = latents[slots].double()
        rows.append((query @ context.T * SCALE).softmax(dim=-1) @ context[:, :VALUE])
    return torch.stack(rows)


@pytest.mark.parametrize("tokens_count", [1, 2, 63, 64, 65, 128, 200])
def test_a_whole_prompt_is_naive_attention(tokens_count):
    prompt = drawn_prompt(tokens_count)
    assert (mla_prefill(*prompt, SCALE) - naive(*prompt)).abs().max() < SCORES_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_smaller_types_lose_no_more_than_they_must(dtype):
    prompt = drawn_prompt(130, dtype)
    result = mla_prefill(*prompt, SCALE)
    tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE
    assert result.dtype == dtype and (result.double() - naive(*prompt)).abs().max() < tolerance


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("begin", [64, 128, 192])
def test_a_chunk_has_the_bits_of_the_whole(begin, dtype, threads_count):
    queries, keys, values = drawn_prompt(230, dtype)
    with threads(threads_count):
        whole = mla_prefill(queries, keys, values, SCALE)
        first = mla_prefill(queries[:begin], keys[:begin], values[:begin], SCALE)
        assert torch.equal(torch.cat([first, mla_prefill(queries[begin:], keys, values, SCALE)]), whole)


def test_a_tile_reads_nothing_after_it():
    queries, keys, values = drawn_prompt(3 * TILE_TOKENS)
    whole = mla_prefill(queries, keys, values, SCALE)
    keys[2 * TILE_TOKENS :], values[2 * TILE_TOKENS :] = float("nan"), float("nan")
    poisoned = mla_prefill(queries, keys, values, SCALE)
    assert torch.equal(poisoned[: 2 * TILE_TOKENS], whole[: 2 * TILE_TOKENS])
    assert poisoned[2 * TILE_TOKENS :].isnan().all()


def test_later_tokens_of_a_tile_weigh_nothing():
    queries, keys, values = drawn_prompt(40)
    whole = mla_prefill(queries, keys, values, SCALE)
    keys[20:], values[20:] = 1e4, -1e4
    assert torch.equal(mla_prefill(queries, keys, values, SCALE)[:20], whole[:20])


def drawn_requests(
    lengths: list[int], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Queries, a pool of latents that is NaN wherever no request has written, and each one's slots.

    Every other request lies in a row, the rest in pages out of order.
    """
    latents = torch.full((64 * 4 * len(lengths), LATENT), float("nan"), dtype=dtype)
    contexts = []
    for index, length in enumerate(lengths):
        pages = torch.arange(4) + 4 * index
        slots = (pages.flip(0)[:, None] * 64 + torch.arange(64)).flatten()[:length]
        first = 4 * index * 64
        contexts.append(slice(first, first + length) if index % 2 else slots)
        latents[contexts[-1]] = torch.randn(length, LATENT).to(dtype)
    return torch.randn(len(lengths), HEADS, LATENT).to(dtype), latents, contexts


RAGGED = [1, 200, 63, 64, 65, 2, 129]


def test_ragged_requests_are_naive_attention_and_unused_slots_are_never_read():
    queries, latents, contexts = drawn_requests(RAGGED)
    result = mla_decode(queries, latents, contexts, VALUE, SCALE)
    assert result.shape == (len(RAGGED), HEADS, VALUE)
    assert (result - naive_decode(queries, latents, contexts)).abs().max() < SCORES_TOLERANCE


def test_decoding_in_bfloat16_loses_no_more_than_it_must():
    queries, latents, contexts = drawn_requests(RAGGED, torch.bfloat16)
    result = mla_decode(queries, latents, contexts, VALUE, SCALE)
    assert result.dtype == torch.bfloat16
    assert (result.double() - naive_decode(queries, latents, contexts)).abs().max() < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_request_has_the_same_bits_alone_and_wherever_its_pages_lie(dtype, threads_count):
    queries, latents, contexts = drawn_requests(RAGGED, dtype)
    with threads(threads_count):
        together = mla_decode(queries, latents, contexts, VALUE, SCALE)
        for row, slots in enumerate(contexts):
            alone = mla_decode(queries[row : row + 1], latents, [slots], VALUE, SCALE)
            moved = latents[slots].clone()
            elsewhere = mla_decode(queries[row : row + 1], moved, [slice(0, len(moved))], VALUE, SCALE)
            assert torch.equal(alone[0], together[row]) and torch.equal(elsewhere[0], together[row])


def test_both_forms_agree_where_keys_are_latents():
    """The last token of a prompt, with one head's keys and values the same latents for all heads."""
    latents = torch.randn(90, LATENT, dtype=torch.float64)
    queries = torch.randn(90, HEADS, LATENT, dtype=torch.float64)
    keys = latents[:, None].expand(-1, HEADS, -1)
    prefilled = mla_prefill(queries, keys, keys[..., :VALUE], SCALE)[-1]
    decoded = mla_decode(queries[-1:], latents, [slice(0, 90)], VALUE, SCALE)[0]
    assert (prefilled - decoded).abs().max() < SCORES_TOLERANCE
