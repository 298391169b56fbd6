"""`quantize_rows` on a GPU: one program for some blocks of one row, each read once and written once."""

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import E4M3_MAX, to_e4m3

BLOCK = 128  # numbers that share a scale
BLOCKS_PER_PROGRAM_MAX = 16


def quantize_rows_kernel(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_rows`, in one launch."""
    rows_count, size = hidden.shape
    quantised, scales = quantised_rows_like(hidden)
    blocks_count = scales.shape[1]
    width = min(triton.next_power_of_2(blocks_count), BLOCKS_PER_PROGRAM_MAX)
    grid = (rows_count, triton.cdiv(blocks_count, width))
    warps = max(width // 4, 1)
    stride = hidden.stride(0)
    quantize_blocks_of_row[grid](
        hidden, quantised, scales, stride, size, blocks_count, width, BLOCK, num_warps=warps
    )
    return quantised, scales


def quantised_rows_like(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for such rows in FP8 and their scales, `[rows, size]` and `[rows, ceil(size / 128)]`."""
    rows_count, size = hidden.shape
    quantised = torch.empty(rows_count, size, dtype=torch.float8_e4m3fn, device=hidden.device)
    scales = torch.empty(rows_count, triton.cdiv(size, BLOCK), dtype=torch.float32, device=hidden.device)
    return quantised, scales


@triton.jit
def quantize_tile(numbers):
    """Blocks `[blocks, 128]` of float32 in FP8 and their scales `[blocks]`, with torch's bits."""
    # As integers, numbers without a sign have the same order, and NaN comes last, where it is not lost.
    largest = tl.max(tl.abs(numbers).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    # Not `/`: that is rounded less exactly on a GPU.
    scales = tl.div_rn(largest, tl.full(largest.shape, E4M3_MAX, tl.float32))
    scales = tl.where(scales > 0, scales, 1.0)
    return to_e4m3(tl.div_rn(numbers, tl.broadcast_to(scales[:, None], numbers.shape))), scales


@triton.jit
def quantize_blocks_of_row(
    hidden, quantised, scales, stride, size, blocks_count, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Some blocks of the row that the program's first number names, the second says which."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    quantize_blocks_at(hidden, quantised, scales, row, first, stride, size, blocks_count, WIDTH, BLOCK)


@triton.jit
def quantize_blocks_at(
    hidden,
    quantised,
    scales,
    row,
    first,
    stride,
    size,
    blocks_count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """WIDTH blocks of an int64 row, from the `first` on."""
    blocks = first + tl.arange(0, WIDTH)
    columns = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < size
    numbers = tl.load(hidden + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    narrow, by = quantize_tile(numbers)
    tl.store(quantised + row * size + columns, narrow, mask=inside)
    tl.store(scales + row * blocks_count + blocks, by, mask=blocks < blocks_count)
