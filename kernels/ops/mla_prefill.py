"""Expanded latent attention of prompts: keys and values of every head.

`mla_prefill` takes a chunk of one prompt, causal. Queries go in tiles of one page, aligned to pages, so that
a row's bits depend on its own prompt alone: not on where chunks were cut, how much came from the cache, or
what else is in the step. `mla_prefill_ragged` takes chunks of many prompts at once, and gives what it takes
to merge them with attention over other keys of the same prompts.
"""

import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.mla_prefill_kernel import mla_prefill_ragged_kernel

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


def mla_prefill_ragged(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    scale: float,
    causal: bool,
    query_tokens_max: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each request's queries over its own keys, and the logarithm of its sum of exponentials.

    | tensor | shape | |
    |---|---|---|
    | queries | `[query tokens, heads, content + rotary]` | |
    | keys | `[key tokens, heads, content]` | may be a view of the unfolded latents, as may values |
    | positions | `[key tokens, rotary]` | the rotary part of keys, the same for all heads |
    | values | `[key tokens, heads, v]` | |
    | query_starts, key_starts | `[requests + 1]` int32 | request r has rows starts[r] to starts[r + 1] |

    Causal queries are their request's last tokens; others see all its keys. No request has more queries than
    `query_tokens_max`. Returns `[query tokens, heads, v]` and natural logarithms `[query tokens, heads]` in
    float32: zeros and -inf for a query that sees nothing, and anything after the last request. Raises
    ValueError for shapes that do not fit, and for rows whose numbers do not lie side by side.
    """
    _check(queries, keys, positions, values)
    attend = mla_prefill_ragged_kernel if runs_kernel(queries) else mla_prefill_ragged_reference
    return attend(queries, keys, positions, values, query_starts, key_starts, scale, causal, query_tokens_max)


def _check(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
    tokens_count, heads_count, content = keys.shape
    if values.shape[:2] != keys.shape[:2] or len(positions) != tokens_count:
        raise ValueError(
            f"keys of {tokens_count} tokens and {heads_count} heads have values of {list(values.shape)} and "
            f"positions of {list(positions.shape)}: tokens must be as many, and heads too"
        )
    if queries.shape[1:] != (heads_count, content + positions.shape[1]):
        raise ValueError(
            f"queries of {list(queries.shape)} do not fit {heads_count} heads of {content} content "
            f"numbers and {positions.shape[1]} of position"
        )
    if any(tensor.stride(-1) != 1 for tensor in (queries, keys, positions, values)):
        raise ValueError("numbers of a row must lie side by side: make the tensor contiguous")


def mla_prefill_ragged_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    scale: float,
    causal: bool,
    query_tokens_max: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mla_prefill_ragged` computes, in torch: in float64 if values are, or else in float32."""
    wide = torch.promote_types(values.dtype, torch.float32)
    out = values.new_zeros(*queries.shape[:2], values.shape[2])
    log_sum_exp = values.new_full(queries.shape[:2], float("-inf"), dtype=wide)
    query_bounds, key_bounds = query_starts.tolist(), key_starts.tolist()
    for request in range(len(query_bounds) - 1):
        own = slice(*query_bounds[request : request + 2])
        seen = slice(*key_bounds[request : request + 2])
        parts = (part.to(wide) for part in (queries[own], keys[seen], positions[seen], values[seen]))
        mixed, log_sum_exp[own] = _attend_request(*parts, scale, causal)
        out[own] = mixed.to(values.dtype)
    return out, log_sum_exp


def _attend_request(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    content, rotary = queries.split([keys.shape[2], positions.shape[1]], dim=-1)
    scores = torch.einsum("qhd,khd->qhk", content, keys) + torch.einsum("qhd,kd->qhk", rotary, positions)
    scores *= scale
    if causal:
        later = torch.ones(len(queries), len(keys), dtype=torch.bool, device=scores.device)
        scores.masked_fill_(later.triu(len(keys) - len(queries) + 1).unsqueeze(1), float("-inf"))
    log_sum_exp = scores.logsumexp(dim=-1)
    weights = (scores - log_sum_exp.clamp_min(torch.finfo(scores.dtype).min).unsqueeze(-1)).exp()
    return torch.einsum("qhk,khd->qhd", weights, values), log_sum_exp
