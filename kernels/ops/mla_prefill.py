"""Expanded latent attention for a chunk of one prompt: keys and values of every head, causal.

Queries go in tiles of one page, aligned to pages, so that a row's bits depend on its own prompt alone: not on
where chunks were cut, how much came from the cache, or what else is in the step.
"""

import torch

TILE_TOKENS = 64


def mla_prefill(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """The last `queries [chunk, heads, qk]` over `keys [context, heads, qk]` to `[chunk, heads, v]`.

    The chunk is the end of the context and begins at a page border: `context - chunk` is a multiple of 64.
    """
    begin = keys.shape[0] - queries.shape[0]
    by_head_queries = (queries * scale).transpose(0, 1).contiguous()
    by_head_keys = keys.permute(1, 2, 0)
    by_head_values = values.transpose(0, 1)
    tiles = [
        attend_tile(by_head_queries, by_head_keys, by_head_values, begin, offset)
        for offset in range(0, queries.shape[0], TILE_TOKENS)
    ]
    return torch.cat(tiles, dim=1).transpose(0, 1)


def attend_tile(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int, offset: int
) -> torch.Tensor:
    """One tile of `queries [heads, chunk, qk]` from `offset`, over everything up to its last token."""
    tile = queries[:, offset : offset + TILE_TOKENS]
    size = tile.shape[1]
    end = begin + offset + size
    scores = torch.bmm(tile, keys[:, :, :end]).float()
    later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
    scores[:, :, end - size :].masked_fill_(later, float("-inf"))
    return torch.bmm(scores.softmax(dim=-1).to(values.dtype), values[:, :end])
