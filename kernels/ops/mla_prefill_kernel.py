"""`mla_prefill_ragged` on a GPU: one program for a tile of one request's queries and one head.

Scores stay in registers, and the softmax is carried from one block of keys to the next, in base two
(FlashAttention-2, arXiv 2307.08691). Tiles begin where their request's queries begin and blocks where its
keys begin, so that bits depend on the request alone. Blocks that every query of a tile sees are not masked.
"""

import math

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import dot, to_dtype

TILE_TOKENS = 128
BLOCK_TOKENS = 64
WARPS_COUNT = 8
STAGES_COUNT = 3  # with 2 the next block would be asked for when this one is done
DOT_WIDTH_MIN = 16
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


def mla_prefill_ragged_kernel(
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
    """As `mla_prefill_ragged`, in one launch; V3's dimensions fit a GPU in bfloat16 alone."""
    tokens_count, heads_count, _ = queries.shape
    sizes = (keys.shape[2], positions.shape[1], values.shape[2])
    out = torch.empty((tokens_count, heads_count, sizes[2]), dtype=values.dtype, device=values.device)
    log_sum_exp = torch.empty((tokens_count, heads_count), dtype=torch.float32, device=values.device)
    grid = (triton.cdiv(query_tokens_max, TILE_TOKENS), heads_count, len(query_starts) - 1)
    _attend_tile[grid](
        queries,
        keys,
        positions,
        values,
        out,
        log_sum_exp,
        query_starts,
        key_starts,
        *queries.stride()[:2],
        *keys.stride()[:2],
        positions.stride(0),
        *values.stride()[:2],
        scale * LOG2_E,
        heads_count,
        causal,
        *sizes,
        *(max(DOT_WIDTH_MIN, triton.next_power_of_2(size)) for size in sizes),
        TILE_TOKENS,
        BLOCK_TOKENS,
        num_warps=WARPS_COUNT,
        num_stages=STAGES_COUNT,
    )
    return out, log_sum_exp


@triton.jit
def _attend_tile(
    queries,
    keys,
    positions,
    values,
    out,
    log_sum_exp,
    query_starts,
    key_starts,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    position_stride,
    value_stride,
    value_head_stride,
    scale,
    heads_count,
    CAUSAL: tl.constexpr,
    CONTENT: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE: tl.constexpr,
    CONTENT_WIDTH: tl.constexpr,
    ROTARY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE  # the last see most, and begin first
    head, request = tl.program_id(1), tl.program_id(2)
    query_start = tl.load(query_starts + request)
    queries_count = tl.load(query_starts + request + 1) - query_start
    rows_count = tl.minimum(queries_count - tile_start, TILE)
    if rows_count <= 0:
        return
    key_start = tl.load(key_starts + request).to(tl.int64)
    keys_count = (tl.load(key_starts + request + 1) - key_start).to(tl.int32)
    rows = tl.arange(0, TILE)
    if CAUSAL:
        before = keys_count - queries_count + tile_start
        seen = before + 1 + rows  # keys, by query
        whole_end = tl.maximum(before + 1, 0) // BLOCK * BLOCK
        end = tl.maximum(before + rows_count, 0)
    else:
        seen = keys_count + rows * 0
        whole_end = keys_count // BLOCK * BLOCK
        end = keys_count
    first_row = query_start.to(tl.int64) + tile_start
    queries += first_row * query_stride + head * query_head_stride
    total, weight, highest = _attend_keys(
        _load_rows(queries, query_stride, rows_count, TILE, CONTENT, CONTENT_WIDTH, True),
        _load_rows(queries + CONTENT, query_stride, rows_count, TILE, ROTARY, ROTARY_WIDTH, True),
        keys + key_start * key_stride + head * key_head_stride,
        key_stride,
        positions + key_start * position_stride,
        position_stride,
        values + key_start * value_stride + head * value_head_stride,
        value_stride,
        seen,
        whole_end,
        end,
        scale,
        CONTENT,
        ROTARY,
        VALUE,
        VALUE_WIDTH,
        BLOCK,
    )
    first_place = first_row * heads_count + head
    _store_rows(total, weight, highest, out, log_sum_exp, first_place, heads_count, rows_count, VALUE)


@triton.jit
def _attend_keys(
    content,
    rotary,
    keys,
    key_stride,
    positions,
    position_stride,
    values,
    value_stride,
    seen,
    whole_end,
    end,
    scale,
    CONTENT: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values weighted and summed, their weights' sum, and the highest score, at which a weight is one."""
    TILE: tl.constexpr = content.shape[0]
    total = tl.zeros([TILE, VALUE_WIDTH], tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    highest = tl.full([TILE], float("-inf"), tl.float32)
    for MASKED in tl.static_range(2):  # blocks that all queries see whole, then those that some see in part
        for start in range(MASKED * whole_end, end if MASKED else whole_end, BLOCK):
            begin, left = tl.cast(start, tl.int64), end - start
            key_block, value_block = keys + begin * key_stride, values + begin * value_stride
            position_block = positions + begin * position_stride
            key = _load_rows(key_block, key_stride, left, BLOCK, CONTENT, content.shape[1], MASKED)
            position = _load_rows(
                position_block, position_stride, left, BLOCK, ROTARY, rotary.shape[1], MASKED
            )
            value = _load_rows(value_block, value_stride, left, BLOCK, VALUE, VALUE_WIDTH, MASKED)
            scores = dot(content, tl.trans(key), tl.zeros([TILE, BLOCK], tl.float32))
            scores = dot(rotary, tl.trans(position), scores)
            if MASKED:
                places = start + tl.arange(0, BLOCK)
                scores = tl.where(places[None, :] < seen[:, None], scores, float("-inf"))
            before, highest = highest, tl.maximum(highest, tl.max(scores, 1) * scale)
            base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
            weights = tl.exp2(scores * scale - base[:, None])
            shrunk = tl.exp2(before - base)
            weight = weight * shrunk + tl.sum(weights, 1)
            total = dot(to_dtype(weights, value.dtype), value, total * shrunk[:, None])
    return total, weight, highest


@triton.jit
def _load_rows(
    first, stride, left, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """`[ROWS, WIDTH]` numbers: zero after SIZE of each row, and from row `left` on if MASKED."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    pointers = first + rows * stride + columns
    if SIZE == WIDTH:
        if MASKED:
            return tl.load(pointers, mask=rows < left, other=0.0)
        else:
            return tl.load(pointers)
    elif MASKED:
        return tl.load(pointers, mask=(rows < left) & (columns < SIZE), other=0.0)
    else:
        return tl.load(pointers, mask=columns < SIZE, other=0.0)


@triton.jit
def _store_rows(
    total, weight, highest, out, log_sum_exp, first_place, heads_count, rows_count, VALUE: tl.constexpr
):
    rows, columns = tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1])
    places = first_place + rows * heads_count
    weight = tl.where(weight == 0, 1.0, weight)  # of a query that saw nothing
    means = to_dtype(total / weight[:, None], out.dtype.element_ty)
    inside = (rows < rows_count)[:, None] & (columns < VALUE)[None, :]
    tl.store(out + places[:, None] * VALUE + columns, means, mask=inside)
    tl.store(log_sum_exp + places, (highest + tl.log2(weight)) * LN_2, mask=rows < rows_count)
