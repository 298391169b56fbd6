"""Attention's two forms against attention written out in double precision; what is unused is poisoned."""

from typing import NamedTuple

import pytest
import torch

from kernels.ops.mla_decode import mla_decode, mla_decode_reference
from kernels.ops.mla_prefill import TILE_TOKENS, mla_prefill
from tests.kernels.ops.rows import THREADS, threads

SCORES_TOLERANCE = 1e-6  # scores pass through float32 on their way to the softmax
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 3e-2
HEADS, QK, V = 3, 24, 16
VALUE, LATENT = 32, 40
SCALE = 0.2
PAGE_TOKENS = 64
TOLERANCES = [
    (torch.float64, SCORES_TOLERANCE),
    (torch.float32, FLOAT32_TOLERANCE),
    (torch.bfloat16, BFLOAT16_TOLERANCE),
]


class DecodeRequests(NamedTuple):
    """The first arguments of `mla_decode`."""

    queries: torch.Tensor
    latents: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor


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


def context_of(requests: DecodeRequests, row: int) -> torch.Tensor:
    """One request's own latents `[length, latent]`, in order."""
    return requests.latents[requests.pages[row]].flatten(0, 1)[: requests.lengths[row]]


def naive_decode(requests: DecodeRequests) -> torch.Tensor:
    """One query token a request over its own latents, in double precision."""
    rows = []
    for row, query in enumerate(requests.queries.double()):
        context = context_of(requests, row).double()
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
    lengths: list[int], dtype: torch.dtype = torch.float64, heads_count: int = HEADS
) -> DecodeRequests:
    """Requests in pages out of order, in a pool that is NaN wherever none of them has written."""
    pages = torch.randperm(4 * len(lengths)).view(len(lengths), 4).to(torch.int32)
    latents = torch.full((4 * len(lengths), PAGE_TOKENS, LATENT), float("nan"), dtype=dtype)
    for row, length in enumerate(lengths):
        for token in range(length):
            page, place = divmod(token, PAGE_TOKENS)
            latents[pages[row, page], place] = torch.randn(LATENT).to(dtype)
    queries = torch.randn(len(lengths), heads_count, LATENT).to(dtype)
    return DecodeRequests(queries, latents, pages, torch.tensor(lengths, dtype=torch.int32))


def decoded(requests: DecodeRequests) -> torch.Tensor:
    """What `mla_decode` makes of them."""
    return mla_decode(*requests, VALUE, SCALE)


RAGGED = [1, 200, 63, 64, 65, 2, 129, 256]


@pytest.mark.parametrize("heads_count", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_ragged_requests_are_naive_attention_and_unused_slots_are_never_read(dtype, tolerance, heads_count):
    requests = drawn_requests(RAGGED, dtype, heads_count)
    result = decoded(requests)
    assert result.dtype == dtype and result.shape == (len(RAGGED), heads_count, VALUE)
    assert (result.double() - naive_decode(requests)).abs().max() < tolerance


def test_compiled_loops_agree_with_the_reference():
    requests = drawn_requests(RAGGED, torch.float32, 8)
    difference = decoded(requests) - mla_decode_reference(*requests, VALUE, SCALE)
    assert 0 < difference.abs().max() < FLOAT32_TOLERANCE, "0 would mean that both are the same code"


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("heads_count", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_request_has_the_same_bits_alone_and_wherever_its_pages_lie(dtype, heads_count, threads_count):
    requests = drawn_requests(RAGGED, dtype, heads_count)
    with threads(threads_count):
        together = decoded(requests)
        for row in range(len(RAGGED)):
            queries, pages, lengths = (
                part[row : row + 1] for part in (requests.queries, requests.pages, requests.lengths)
            )
            alone = decoded(DecodeRequests(queries, requests.latents, pages, lengths))
            moved = requests.latents[requests.pages[row]]
            in_a_row = torch.arange(4, dtype=torch.int32)[None]
            elsewhere = decoded(DecodeRequests(queries, moved, in_a_row, lengths))
            assert torch.equal(alone[0], together[row]) and torch.equal(elsewhere[0], together[row])


def test_a_request_that_is_no_number_spoils_only_itself():
    requests = drawn_requests(RAGGED, torch.float32)
    before = decoded(requests)
    requests.latents[requests.pages[1, 0], 5] = float("nan")
    after = decoded(requests)
    assert after[1].isnan().all()
    assert torch.equal(after[2:], before[2:]) and torch.equal(after[0], before[0])


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES[:2], ids=str)
def test_both_forms_agree_where_keys_are_latents(dtype, tolerance):
    """The last token of a prompt, with one head's keys and values the same latents for all heads."""
    requests = drawn_requests([90], dtype)
    latents = context_of(requests, 0)
    keys = latents[:, None].expand(-1, HEADS, -1)
    queries = torch.cat([torch.randn(89, HEADS, LATENT).to(dtype), requests.queries])
    prefilled = mla_prefill(queries, keys, keys[..., :VALUE], SCALE)[-1]
    assert (prefilled - decoded(requests)[0]).abs().max() < tolerance
