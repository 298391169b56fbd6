"""`linear_fp8` on a GPU: tiles of 128 outputs, one scale of the weight for each step of 128 inputs.

Batch invariance: a row's sum is cut into parts that depend on the weight's shape alone; a part adds its
blocks of 128 inputs in order, and the parts are added in order. With few rows each part has programs of its
own, so that all the chip reads weights, and a second launch adds the parts; with many rows one program runs
through all parts. No number of another row enters a row's sums, so company that brings tiles of the same
size never changes its bits. The number of rows decides how many of them a tile holds and which side of the
product they are on: that other tiles leave the same bits is assumed, namely that tensor cores add the 128
terms of a block alike on either side and in any width of an instruction. Nothing but a GPU can show it:
tests ask it there.
"""

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.linear_kernel import TILE_GROUP, find_tile, sum_parts
from kernels.ops.narrow import dot, to_dtype

BLOCK = 128  # inputs and outputs that share a scale
PROGRAMS_WANTED = 264  # two for each processor of the largest Hopper GPU; a constant, since bits depend on it
PART_BLOCKS_MIN = 6  # shorter parts would cost more to add than they save
PARTIAL_NUMBERS_MAX = (
    4 << 20
)  # 16 MiB of float32, which stays in the chip's cache from one launch to the next


def linear_fp8_kernel(
    hidden: torch.Tensor,
    hidden_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `linear_fp8`, in one launch, or two with few rows and a weight of few outputs."""
    rows_count, out_count = len(hidden), len(weight)
    parts_count = parts_of(out_count, weight.shape[1])
    out = torch.empty(rows_count, out_count, dtype=dtype, device=hidden.device)
    if parts_count == 1 or parts_count * out.numel() > PARTIAL_NUMBERS_MAX:
        _launch(hidden, hidden_scales, weight, weight_scales, out, parts_count, 1)
        return out
    partial = torch.empty(parts_count, rows_count, out_count, dtype=torch.float32, device=hidden.device)
    _launch(hidden, hidden_scales, weight, weight_scales, partial, parts_count, parts_count)
    sum_parts(partial, None, out)
    return out


def parts_of(out_count: int, in_count: int) -> int:
    """Parts into which a sum over so many inputs is cut: as many blocks of inputs in each."""
    blocks_count = triton.cdiv(in_count, BLOCK)
    most = min(PROGRAMS_WANTED // triton.cdiv(out_count, BLOCK), blocks_count // PART_BLOCKS_MIN)
    return next((count for count in range(most, 1, -1) if blocks_count % count == 0), 1)


def tile_of(rows_count: int) -> tuple[int, int, int]:
    """Rows of a tile, warps that share it, and stages of its pipeline."""
    if rows_count <= 32:
        return (16 if rows_count <= 16 else 32), 4, 4
    return (64, 4, 3) if rows_count <= 128 else (128, 8, 4)


def _launch(hidden, hidden_scales, weight, weight_scales, out, parts_count: int, programs_of_a_tile: int):
    rows_count, in_count = hidden.shape
    block_rows, warps, stages = tile_of(rows_count)
    blocks_count = triton.cdiv(in_count, BLOCK)
    tiles = triton.cdiv(rows_count, block_rows) * triton.cdiv(len(weight), BLOCK)
    _multiply[tiles, programs_of_a_tile](
        hidden,
        hidden_scales,
        weight,
        weight_scales,
        out,
        rows_count,
        len(weight),
        in_count,
        hidden.stride(0),
        hidden_scales.stride(0),
        hidden_scales.stride(1),
        weight.stride(0),
        weight_scales.stride(0),
        BLOCKS=blocks_count // programs_of_a_tile,
        PART_BLOCKS=blocks_count // parts_count,
        IS_WHOLE=in_count % BLOCK == 0,
        ROWS=block_rows,
        BLOCK=BLOCK,
        TILE_GROUP=TILE_GROUP,
        STAGES=stages,
        num_warps=warps,
    )


@triton.jit(do_not_specialize=["rows_count"])
def _multiply(
    hidden,
    hidden_scales,
    weight,
    weight_scales,
    out,
    rows_count,
    out_count,
    in_count,
    hidden_stride,
    hidden_scales_stride,
    hidden_scales_step,
    weight_stride,
    weight_scales_stride,
    BLOCKS: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tile, out_tile = find_tile(rows_count, out_count, ROWS, BLOCK, TILE_GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    outs = out_tile * BLOCK + tl.arange(0, BLOCK)
    # Beyond the end the last row is read again, and not written.
    read_rows = tl.minimum(rows, rows_count - 1).to(tl.int64)
    read_outs = tl.minimum(outs, out_count - 1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    begin = tl.program_id(1) * BLOCKS
    hidden += read_rows[:, None] * hidden_stride + columns[None, :]
    weight += read_outs[:, None] * weight_stride + columns[None, :]
    hidden_scales += read_rows * hidden_scales_stride
    weight_scales += out_tile.to(tl.int64) * weight_scales_stride
    FEW: tl.constexpr = ROWS < 64  # too few for the chip's left side: there stand the weights
    total = tl.zeros((BLOCK, ROWS) if FEW else (ROWS, BLOCK), tl.float32)
    part = total
    for index in tl.range(0, BLOCKS, num_stages=STAGES):
        block = begin + index
        by = tl.load(hidden_scales + block * hidden_scales_step) * tl.load(weight_scales + block)
        if IS_WHOLE:
            left = tl.load(hidden + block * BLOCK)
            right = tl.load(weight + block * BLOCK)
        else:
            inside = columns[None, :] < in_count - block * BLOCK
            left = tl.load(hidden + block * BLOCK, mask=inside, other=0.0)
            right = tl.load(weight + block * BLOCK, mask=inside, other=0.0)
        nothing = tl.zeros(total.shape, tl.float32)
        if FEW:
            part += dot(right, tl.trans(left), nothing) * by[None, :]
        else:
            part += dot(left, tl.trans(right), nothing) * by[:, None]
        if PART_BLOCKS < BLOCKS and (index + 1) % PART_BLOCKS == 0:
            total += part
            part = nothing
    if PART_BLOCKS == BLOCKS:
        total = part
    total = to_dtype(total, out.dtype.element_ty)
    if FEW:
        total = tl.trans(total)
    out += tl.program_id(1).to(tl.int64) * rows_count * out_count
    out += rows.to(tl.int64)[:, None] * out_count + outs[None, :]
    tl.store(out, total, mask=(rows < rows_count)[:, None] & (outs < out_count)[None, :])
