"""Absorbed latent attention: one query token a request over its latents in pages, keys and values being one.

Each request is computed on its own over just the tokens it has: its bits do not depend on its neighbours,
and what other slots of its pages hold is never read.
"""

import itertools

import numpy as np
import torch

from kernels.ops.compiled import add_product, add_two_products, compiled, multiply_four, runs_compiled


def mla_decode_reference(
    queries: torch.Tensor,
    latents: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
) -> torch.Tensor:
    """What `mla_decode` computes, request by request in torch."""
    scaled = queries * scale
    out = queries.new_empty(*queries.shape[:2], value_dim)
    page_tokens = latents.shape[1]
    for request, length in enumerate(lengths.tolist()):
        used = pages[request, : -(-length // page_tokens)].tolist()
        in_a_row = all(after == before + 1 for before, after in itertools.pairwise(used))
        context = latents[used[0] : used[0] + len(used)] if in_a_row else latents[used]
        context = context.flatten(0, 1)[:length]
        weights = torch.mm(scaled[request], context.t()).float().softmax(dim=-1)
        torch.mm(weights.to(context.dtype), context[:, :value_dim], out=out[request])
    return out


def mla_decode(
    queries: torch.Tensor,
    latents: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
) -> torch.Tensor:
    """`queries [requests, heads, latent]` over `latents [pages, 64, latent]`, to `[requests, heads, value]`.

    A request's context is the first `lengths [requests]` tokens of its row of `pages [requests, most]`, both
    int32.
    """
    if not runs_compiled(queries):
        return mla_decode_reference(queries, latents, pages, lengths, value_dim, scale)
    slots_max = pages.shape[1] * latents.shape[1]
    if not len(queries) == len(pages) == len(lengths) or queries.shape[2] != latents.shape[2]:
        raise ValueError(f"queries {list(queries.shape)}, pages and lengths do not fit each other")
    if len(lengths) and (lengths.numpy().max() > slots_max or pages.numpy().max() >= len(latents)):
        raise ValueError("a context is longer than its pages, or names pages that are not there")
    out = queries.new_empty(*queries.shape[:2], value_dim)
    scores = np.empty((queries.shape[1], slots_max), np.float32)
    given = (queries.contiguous(), latents, pages, lengths)
    _attend_all(*(tensor.numpy() for tensor in given), np.float32(scale), scores, out.numpy())
    return out


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
        greatest = row.max()
        total = np.float32(0)
        for token in range(length):
            row[token] = np.exp((row[token] - greatest) * scale)
            total += row[token]
        for token in range(length):
            row[token] /= total


@compiled()
def _mix(weights, latents, pages, length, out):
    """Sum of the latents' first numbers by weight, `[heads, value]`, two heads at a time."""
    page_tokens = latents.shape[1]
    heads_count = len(out)
    out[:] = 0
    for begin in range(0, length, page_tokens):
        end = min(begin + page_tokens, length)
        values = latents[pages[begin // page_tokens]]
        for head in range(0, heads_count - 1, 2):
            by, other_by = weights[head, begin:end], weights[head + 1, begin:end]
            add_two_products(by, other_by, values, out[head], out[head + 1])
        if heads_count % 2:
            add_product(weights[heads_count - 1, begin:end], values, out[heads_count - 1])


@compiled(
    "void(float32[:, :, ::1], float32[:, :, ::1], int32[:, ::1], int32[::1], float32, float32[:, ::1],"
    " float32[:, :, ::1])"
)
def _attend_all(queries, latents, pages, lengths, scale, scores, out):
    for request in range(len(lengths)):
        length = lengths[request]
        _weigh(queries[request], latents, pages[request], length, scores)
        _soften(scores, length, scale)
        _mix(scores, latents, pages[request], length, out[request])
