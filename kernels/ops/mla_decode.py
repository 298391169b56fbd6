"""Absorbed latent attention: one query token a request over its latents in pages, keys and values being one.

Each request is computed on its own over just the slots it has filled: its bits do not depend on its
neighbours, and what other slots of its pages hold is never read.
"""

from collections.abc import Sequence

import torch

Slots = slice | torch.Tensor


def mla_decode(
    queries: torch.Tensor, latents: torch.Tensor, contexts: Sequence[Slots], value_dim: int, scale: float
) -> torch.Tensor:
    """`queries [requests, heads, latent]` over `latents [slots, latent]`, to `[requests, heads, value]`.

    `contexts` names each request's slots in order: a slice where its pages lie in a row, else an index.
    """
    scaled = queries * scale
    out = queries.new_empty(len(contexts), queries.shape[1], value_dim)
    for row, slots in enumerate(contexts):
        context = latents[slots]
        weights = torch.mm(scaled[row], context.t()).float().softmax(dim=-1)
        torch.mm(weights.to(context.dtype), context[:, :value_dim], out=out[row])
    return out
