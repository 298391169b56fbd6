"""Absorbed latent attention: a request's newest tokens over its latents in pages, keys and values being one.

Each request is computed on its own over just the tokens it has: its bits do not depend on its neighbours,
and what other slots of its pages hold is never read.
"""

import itertools

import numpy as np
import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import (
    add_four_products,
    add_product,
    compiled,
    exp_each,
    greatest_of,
    multiply_four,
    runs_compiled,
    sum_of,
)
from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.latent_format import unpack_latents_reference
from kernels.ops.mla_decode_kernel import mla_decode_kernel


def mla_decode_reference(
    queries: torch.Tensor,
    latents: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
) -> torch.Tensor:
    """What `mla_decode` computes, row by row in torch."""
    scaled = queries * scale
    out = queries.new_zeros(*queries.shape[:2], value_dim)
    newest_count = newest_tokens_count(queries, lengths)
    for row in range(len(queries)):
        request, newest = divmod(row, newest_count)
        length = int(lengths[request]) - (newest_count - 1 - newest)
        if length <= 0:
            continue
        context = context_of(latents, pages[request], length)
        if latents.dtype == torch.uint8:
            context = unpack_latents_reference(context, value_dim, queries.dtype)
        weights = torch.mm(scaled[row], context.t()).float().softmax(dim=-1)
        torch.mm(weights.to(context.dtype), context[:, :value_dim], out=out[row])
    return out


def newest_tokens_count(queries: torch.Tensor, lengths: torch.Tensor) -> int:
    """How many of `queries [requests * newest, heads, latent]` each request has."""
    return len(queries) // max(len(lengths), 1)


def context_of(latents: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` rows of latents in one request's pages; a view where those are in a row."""
    used = pages[: -(-length // latents.shape[1])].tolist()
    in_a_row = all(after == before + 1 for before, after in itertools.pairwise(used))
    context = latents[used[0] : used[0] + len(used)] if in_a_row else latents[used]
    return context.flatten(0, 1)[:length]


def mla_decode(
    queries: torch.Tensor,
    latents: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
) -> torch.Tensor:
    """`queries [requests * newest, heads, latent]` over `latents [pages, 64, row]`, to `[..., heads, value]`.

    A request's context is the first `lengths [requests]` tokens of its row of `pages [requests, most]`, both
    int32. Its queries are those of its newest tokens in order, as many for each request: the last sees the
    whole context, the one before all but the last token, and one that sees nothing has zeros. Rows of latents
    are numbers, or uint8 in the layout of `latent_format`. Raises ValueError for shapes that do not fit.
    """
    newest_count = newest_tokens_count(queries, lengths)
    if len(pages) != len(lengths) or newest_count * len(lengths) != len(queries):
        raise ValueError(f"queries {list(queries.shape)}, pages and lengths do not fit each other")
    if latents.shape[2] != row_size(latents.dtype, value_dim, queries.shape[2] - value_dim):
        raise ValueError(f"queries {list(queries.shape)} do not fit latents {list(latents.shape)}")
    if runs_kernel(queries):
        return mla_decode_kernel(queries, latents, pages, lengths, value_dim, scale)
    if newest_count != 1 or not (runs_compiled(queries) and runs_compiled(latents)):
        return mla_decode_reference(queries, latents, pages, lengths, value_dim, scale)
    slots_max = pages.shape[1] * latents.shape[1]
    if lengths.numpy().max() > slots_max or pages.numpy().max() >= len(latents):
        raise ValueError("a context is longer than its pages, or names pages that are not there")
    out = queries.new_empty(*queries.shape[:2], value_dim)
    scores = np.empty((queries.shape[1], slots_max), np.float32)
    given = (queries.contiguous(), latents, pages, lengths)
    _attend_all(*(tensor.numpy() for tensor in given), np.float32(scale), scores, out.numpy())
    return out


def row_size(dtype: torch.dtype, value_dim: int, position_dim: int) -> int:
    """Numbers, or bytes of uint8, of one token's latent."""
    return packed_bytes(value_dim, position_dim) if dtype == torch.uint8 else value_dim + position_dim


@compiled()
def _weigh(queries, latents, pages, length, scores):
    """Scores `[heads, length]` of one request, four heads at a time while a token's latent is at hand."""
    page_tokens, last = latents.shape[1], len(queries) - 1
    for begin in range(0, length, page_tokens):
        end = min(begin + page_tokens, length)
        keys = latents[pages[begin // page_tokens]]
        for head in range(0, last + 1, 4):
            # past the last head the last one is computed again
            second, third, fourth = min(head + 1, last), min(head + 2, last), min(head + 3, last)
            four = (queries[head], queries[second], queries[third], queries[fourth])
            outs = (
                scores[head, begin:end],
                scores[second, begin:end],
                scores[third, begin:end],
                scores[fourth, begin:end],
            )
            multiply_four(four, keys, outs)


@compiled()
def _soften(scores, length, scale):
    """Softmax of each head's first `length` scores times `scale`."""
    for head in range(scores.shape[0]):
        row = scores[head, :length]
        greatest = greatest_of(row)
        for token in range(length):
            row[token] = (row[token] - greatest) * scale
        exp_each(row)
        total = sum_of(row)
        for token in range(length):
            row[token] /= total


@compiled()
def _mix(weights, latents, pages, length, out):
    """Sum of the latents' first numbers by weight, `[heads, value]`, four heads at a time."""
    page_tokens = latents.shape[1]
    whole = len(out) // 4 * 4
    out[:] = 0
    for begin in range(0, length, page_tokens):
        end = min(begin + page_tokens, length)
        values = latents[pages[begin // page_tokens]]
        by = weights[:, begin:end]
        for head in range(0, whole, 4):
            four = (by[head], by[head + 1], by[head + 2], by[head + 3])
            outs = (out[head], out[head + 1], out[head + 2], out[head + 3])
            add_four_products(four, values, outs)
        for head in range(whole, len(out)):
            add_product(by[head], values, out[head])


@compiled(
    "void(float32[:, :, ::1], float32[:, :, ::1], int32[:, ::1], int32[::1], float32, float32[:, ::1],"
    " float32[:, :, ::1])"
)
def _attend_all(queries, latents, pages, lengths, scale, scores, out):
    for request in range(len(lengths)):
        length = lengths[request]
        if length == 0:
            out[request] = 0
            continue
        _weigh(queries[request], latents, pages[request], length, scores)
        _soften(scores, length, scale)
        _mix(scores, latents, pages[request], length, out[request])
