"""`merge_attention` on a GPU: a program for some tokens and heads, which reads only what weighs anything."""

import math

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import to_dtype

ROWS = 32
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


def merge_attention_kernel(
    out_first: torch.Tensor,
    log_sum_exp_first: torch.Tensor,
    out_second: torch.Tensor,
    log_sum_exp_second: torch.Tensor,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `merge_attention`, in one launch."""
    out = out_first if in_place else torch.empty_like(out_first)
    log_sum_exp = log_sum_exp_first if in_place else torch.empty_like(log_sum_exp_first)
    rows_count, size = log_sum_exp.numel(), out.shape[2]
    _merge_rows[(triton.cdiv(rows_count, ROWS),)](
        out_first,
        log_sum_exp_first,
        out_second,
        log_sum_exp_second,
        out,
        log_sum_exp,
        rows_count,
        size,
        triton.next_power_of_2(size),
        ROWS,
        num_warps=4,
    )
    return out, log_sum_exp


@triton.jit
def _merge_rows(
    out_first,
    log_sum_exp_first,
    out_second,
    log_sum_exp_second,
    out,
    log_sum_exp,
    rows_count,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < rows_count
    first_sum = tl.load(log_sum_exp_first + rows, mask=inside, other=float("-inf"))
    second_sum = tl.load(log_sum_exp_second + rows, mask=inside, other=float("-inf"))
    highest = tl.maximum(first_sum, second_sum)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    first_weight = tl.exp2((first_sum - base) * LOG2_E)
    second_weight = tl.exp2((second_sum - base) * LOG2_E)
    weight = tl.where(highest == float("-inf"), 1.0, first_weight + second_weight)
    columns = tl.arange(0, WIDTH)[None, :]
    places = rows[:, None] * SIZE + columns
    first = tl.load(out_first + places, mask=(first_weight > 0)[:, None] & (columns < SIZE), other=0.0)
    second = tl.load(out_second + places, mask=(second_weight > 0)[:, None] & (columns < SIZE), other=0.0)
    sums = first.to(tl.float32) * first_weight[:, None] + second.to(tl.float32) * second_weight[:, None]
    merged = tl.div_rn(sums, tl.broadcast_to(weight[:, None], sums.shape))  # by one: not a bit changes
    tl.store(out + places, to_dtype(merged, out.dtype.element_ty), mask=inside[:, None] & (columns < SIZE))
    tl.debug_barrier()  # in place: warps may still read the sums that the first of them writes
    tl.store(log_sum_exp + rows, highest + tl.log2(weight) * LN_2, mask=inside)
