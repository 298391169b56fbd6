"""`mla_decode` on a GPU: splits of a context attended side by side, then merged in a fixed order.

A program holds a tile of rows, which are heads and newest tokens of one request, and reads each latent once,
for scores and for values. What a split leaves, in float32, is its mean of values and the logarithm of its sum
of weights, in base two as all exponentials here (flash-decoding; FlashAttention, arXiv 2205.14135).

Numbers that follow the longest context are not specialised on: as contexts grow nothing is compiled anew.
"""

import math
from typing import NamedTuple

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.load_latents_kernel import load_latents, parts_of, within
from kernels.ops.narrow import dot, to_dtype
from kernels.ops.split_context import INVARIANT_SPLITS_MAX, SplitPlan, invariant_split_plan, split_plan

LOG2_E = math.log2(math.e)
LOWEST = tl.constexpr(-1e38)  # below all scores, and finite: where none is seen, weights are 0 and not NaN
MERGED_SPLITS = 8  # whose means are read together
MULTIPROCESSORS_COUNT = 132  # of a GPU that is not there
DOT_WIDTH_MIN = 16


class Tiling(NamedTuple):
    """What a program takes at a time, and the warps and buffers it has for that."""

    rows: int
    tokens: int
    warps_count: int
    stages_count: int
    running_count: int = 1
    """Programs for which a multiprocessor has registers and shared memory."""


# Few rows wait for memory: two programs on a multiprocessor, each with two blocks of latents under way. FP8
# waits for its conversion, which twice as many warps share.
NARROW = Tiling(rows=16, tokens=32, warps_count=4, stages_count=3, running_count=2)
NARROW_PACKED = Tiling(rows=16, tokens=64, warps_count=8, stages_count=3)
# Many rows wait for products, whose operands both lie in shared memory: with 32 tokens it would be read 1.7
# times as often. More stages do not fit beside the queries.
WIDE = Tiling(rows=64, tokens=64, warps_count=8, stages_count=2)


def mla_decode_kernel(
    queries: torch.Tensor,
    latents: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
    batch_invariant: bool = True,
) -> torch.Tensor:
    """As `mla_decode`, in one launch, or two where `pages` have room for more than one split.

    Unless `batch_invariant`, splits are those by which this batch is done soonest, and bits depend on it.
    """
    requests_count, heads_count = len(lengths), queries.shape[1]
    out = torch.empty((*queries.shape[:2], value_dim), dtype=queries.dtype, device=queries.device)
    if not out.numel():
        return out
    rows_count = len(queries) // requests_count * heads_count
    tiling = tiling_for(rows_count, latents.dtype == torch.uint8)
    row_tiles_count = triton.cdiv(rows_count, tiling.rows)
    context_tokens_max = pages.shape[1] * latents.shape[1]
    if batch_invariant:
        plan = invariant_split_plan(context_tokens_max)
    else:
        running_count = tiling.running_count * multiprocessors_count(queries.device)
        plan = split_plan(requests_count, row_tiles_count, context_tokens_max, running_count)
    means, sums = scratch_for(plan, out, requests_count, rows_count)
    parts = parts_of(latents, value_dim)
    widths = (width_of(value_dim), width_of(queries.shape[2] - value_dim))
    _attend_split[(row_tiles_count, requests_count, plan.splits_count)](
        queries,
        *parts,
        pages,
        lengths,
        out,
        means,
        sums,
        *queries.stride()[:2],
        pages.stride(0),
        parts.values.stride(0),
        scale * LOG2_E,
        rows_count,
        heads_count,
        plan.splits_count,
        plan.unit_tokens,
        value_dim,
        queries.shape[2] - value_dim,
        *widths,
        parts.values.stride(1),
        latents.shape[1],
        tiling.rows,
        min(tiling.tokens, latents.shape[1]),
        num_warps=tiling.warps_count,
        num_stages=tiling.stages_count,
    )
    if plan.splits_count > 1:
        splits = (plan.splits_count, plan.unit_tokens)
        width = triton.next_power_of_2(max(plan.splits_count, INVARIANT_SPLITS_MAX))
        sizes = (value_dim, widths[0], width, MERGED_SPLITS)
        _merge_splits[(rows_count, requests_count)](means, sums, lengths, out, rows_count, *splits, *sizes)
    return out


def tiling_for(rows_count: int, is_packed: bool) -> Tiling:
    """The tiling for requests of so many rows."""
    if rows_count > NARROW.rows:
        return WIDE
    return NARROW_PACKED if is_packed else NARROW


def multiprocessors_count(device: torch.device) -> int:
    """How many there are, or of a large Hopper GPU where there is none."""
    if device.type != "cuda":
        return MULTIPROCESSORS_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count


def width_of(size: int) -> int:
    """The power of two that a tile of `size` columns takes, which `dot` needs to be 16 or more."""
    return max(DOT_WIDTH_MIN, triton.next_power_of_2(size))


def scratch_for(
    plan: SplitPlan, out: torch.Tensor, requests_count: int, rows_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means `[requests, splits, rows, value]` and sums without `value`, float32; none of one split."""
    shape = (requests_count if plan.splits_count > 1 else 0, plan.splits_count, rows_count)
    means = torch.empty((*shape, out.shape[2]), dtype=torch.float32, device=out.device)
    return means, torch.empty(shape, dtype=torch.float32, device=out.device)


@triton.jit
def _split_tokens(length, splits_count, unit_tokens):
    """Tokens of each split, as `split_context` says."""
    return tl.maximum(tl.cdiv(length, splits_count * unit_tokens), 1) * unit_tokens


@triton.jit
def _load_query(at, inside, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile `[rows, WIDTH]` of queries from pointers `at [rows]`."""
    columns = tl.arange(0, WIDTH)
    return tl.load(at[:, None] + columns, mask=within(inside[:, None], columns, SIZE, WIDTH), other=0.0)


@triton.jit
def _attend_tokens(
    query_value,
    query_position,
    values,
    positions,
    scales,
    pages,
    begin,
    end,
    row_ends,
    whole_end,
    scale,
    page_stride,
    STRIDE: tl.constexpr,
    VALUE: tl.constexpr,
    POSITION: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The mean of values of tokens `begin` to `end` by weight, and the logarithm of the sum of weights.

    A row sees tokens before its `row_ends [rows]`, and every row those before `whole_end`.
    """
    ROWS: tl.constexpr = query_value.shape[0]
    VALUE_WIDTH: tl.constexpr = query_value.shape[1]
    dtype: tl.constexpr = query_value.dtype
    greatest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    page = tl.load(pages + begin // PAGE_TOKENS, mask=begin < end, other=0)
    # what does not change from block to block is not kept in registers, of which sums take half
    for block in tl.range(begin, end, TOKENS, disable_licm=ROWS >= 64):
        inside = tl.arange(0, TOKENS) < end - block
        latent, position = load_latents(
            values,
            positions,
            scales,
            page.to(tl.int64),
            block % PAGE_TOKENS,
            inside,
            page_stride,
            STRIDE,
            VALUE,
            POSITION,
            VALUE_WIDTH,
            query_position.shape[1],
            dtype,
        )
        after = block + TOKENS
        page = tl.load(pages + after // PAGE_TOKENS, mask=after < end, other=0)  # in time for its latents
        # Two sums, each scaled, and masks under a condition: a compiler that saw one product's sum go into
        # the next product would have both groups of warps compute all of it.
        nothing = tl.zeros((ROWS, TOKENS), tl.float32)
        scores = dot(query_position, tl.trans(position), nothing) * scale
        scores += dot(query_value, tl.trans(latent), nothing) * scale
        if after > whole_end:
            tokens = block + tl.arange(0, TOKENS)
            scores = tl.where(tokens[None, :] < row_ends[:, None], scores, float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fading = tl.exp2(greatest - higher)
        total = total * fading + tl.sum(weights, 1)
        mixed = dot(to_dtype(weights, dtype), latent, mixed * fading[:, None])
        greatest = higher
    total = tl.where(total == 0, 1.0, total)  # what sees nothing here has a mean of 0 and next to no weight
    return mixed * (1.0 / total)[:, None], greatest + tl.log2(total)


@triton.jit(do_not_specialize=["pages", "lengths", "pages_stride", "splits_count", "unit_tokens"])
def _attend_split(
    queries,
    values,
    positions,
    scales,
    pages,
    lengths,
    out,
    means,
    sums,
    query_token_stride,
    query_head_stride,
    pages_stride,
    page_stride,
    scale,
    rows_count,
    heads_count,
    splits_count,
    unit_tokens,
    VALUE: tl.constexpr,
    POSITION: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    POSITION_WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of rows over one split, into `out` where it is the only one, else into `means` and `sums`."""
    first, request, split = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + request)
    split_tokens = _split_tokens(length, splits_count, unit_tokens)
    begin = split * split_tokens
    if (begin >= length) & (split > 0):
        return
    end = tl.minimum(begin + split_tokens, length)
    rows, newest_count = tl.arange(0, ROWS), rows_count // heads_count
    inside = rows < rows_count - first
    newest, head = (first + rows) // heads_count, (first + rows) % heads_count
    queries += request * newest_count * query_token_stride
    at = queries + (newest * query_token_stride + head * query_head_stride)
    mean, logarithm = _attend_tokens(
        _load_query(at, inside, VALUE, VALUE_WIDTH),
        _load_query(at + VALUE, inside, POSITION, POSITION_WIDTH),
        values,
        positions,
        scales,
        pages + request * pages_stride,
        begin,
        end,
        tl.minimum(length - newest_count + 1 + newest, end),
        tl.minimum(length - newest_count + 1, end),
        scale,
        page_stride,
        STRIDE,
        VALUE,
        POSITION,
        PAGE_TOKENS,
        TOKENS,
    )
    columns = tl.arange(0, VALUE_WIDTH)
    mask = within(inside[:, None], columns, VALUE, VALUE_WIDTH)
    to = rows[:, None] * VALUE + columns
    if length <= split_tokens:
        out += (request * rows_count + first) * VALUE
        tl.store(out + to, to_dtype(mean, out.dtype.element_ty), mask=mask)
    else:
        before = (request * splits_count + split) * rows_count + first
        tl.store(means + before * VALUE + to, mean, mask=mask)
        tl.store(sums + before + rows, logarithm, mask=inside)


@triton.jit(do_not_specialize=["lengths", "splits_count", "unit_tokens"])
def _merge_splits(
    means,
    sums,
    lengths,
    out,
    rows_count,
    splits_count,
    unit_tokens,
    VALUE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SPLITS_WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
):
    """One row of one request: the mean of its splits' means by their sums of weights."""
    row, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + request)
    split_tokens = _split_tokens(length, splits_count, unit_tokens)
    if length <= split_tokens:
        return
    used_count = tl.cdiv(length, split_tokens)
    sums += request * splits_count * rows_count + row
    means += (request * splits_count * rows_count + row) * VALUE
    every, columns = tl.arange(0, SPLITS_WIDTH), tl.arange(0, VALUE_WIDTH)
    greatest = tl.max(tl.load(sums + every * rows_count, mask=every < used_count, other=float("-inf")))
    total = 0.0
    mixed = tl.zeros((VALUE_WIDTH,), tl.float32)
    for first in range(0, used_count, MERGED):  # so many at a time whatever the plan: one order of sums
        splits = first + tl.arange(0, MERGED)
        used = splits < used_count
        weights = tl.exp2(tl.load(sums + splits * rows_count, mask=used, other=float("-inf")) - greatest)
        mask = within(used[:, None], columns, VALUE, VALUE_WIDTH)
        mean = tl.load(means + splits[:, None] * (rows_count * VALUE) + columns, mask=mask, other=0.0)
        mixed += tl.sum(weights[:, None] * mean, 0)
        total += tl.sum(weights)
    to = out + (request * rows_count + row) * VALUE + columns
    tl.store(to, to_dtype(mixed / total, out.dtype.element_ty), mask=columns < VALUE)
