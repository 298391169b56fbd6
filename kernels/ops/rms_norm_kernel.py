"""The norms on a GPU: one program a row, which stays in registers from its sum to its last product.

All are one kernel, so that they have the same bits: what is added before and rounded to FP8 after only spares
launches and ways through memory.
"""

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import to_dtype
from kernels.ops.quantize_kernel import BLOCK, quantised_rows_like, quantize_tile

WARPS_BY_WIDTH = {512: 1, 2048: 4, 8192: 8}


def rms_norm_kernel(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As `rms_norm`, in one launch."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if out is None else out
    _launch(hidden, None, weight, eps, out, None)
    return out


def add_rms_norm_kernel(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `add_rms_norm`, in one launch."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _launch(hidden, residual, weight, eps, out, None)
    return out


def rms_norm_quantize_kernel(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm_quantize`, in one launch."""
    quantised, scales = quantised_rows_like(hidden)
    _launch(hidden, None, weight, eps, quantised, scales)
    return quantised, scales


def add_rms_norm_quantize_kernel(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm_quantize`, in one launch."""
    quantised, scales = quantised_rows_like(hidden)
    _launch(hidden, residual, weight, eps, quantised, scales)
    return quantised, scales


def warps_for(width: int) -> int:
    """Warps that share a row of so many numbers."""
    return next((warps for most, warps in WARPS_BY_WIDTH.items() if width <= most), 16)


def _launch(hidden, residual, weight, eps: float, out, scales) -> None:
    rows_count, size = hidden.shape
    blocks_max = triton.next_power_of_2(triton.cdiv(size, BLOCK))
    summed = hidden if residual is None else residual
    _norm_row[(rows_count,)](
        hidden,
        summed,
        weight,
        out,
        out if scales is None else scales,
        hidden.stride(0),
        summed.stride(0),
        out.stride(0),
        eps,
        SIZE=size,
        BLOCKS_MAX=blocks_max,
        BLOCK=BLOCK,
        ADDS=residual is not None,
        QUANTISES=scales is not None,
        num_warps=warps_for(blocks_max * BLOCK),
    )


@triton.jit
def _norm_row(
    hidden,
    residual,
    weight,
    out,
    scales,
    hidden_stride,
    residual_stride,
    out_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCKS_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    QUANTISES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCKS_MAX * BLOCK)
    inside = columns < SIZE
    dtype: tl.constexpr = residual.dtype.element_ty  # where nothing is added, that of `hidden`
    numbers = tl.load(hidden + row * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        place = residual + row * residual_stride + columns
        rounded = to_dtype(numbers + tl.load(place, mask=inside, other=0.0).to(tl.float32), dtype)
        tl.store(place, rounded, mask=inside)
        numbers = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers) / SIZE + eps)
    normed = to_dtype(numbers * scale, dtype).to(tl.float32)  # rounded before the weight, as in torch
    by = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = to_dtype(normed * by, dtype)
    if QUANTISES:
        # Only here by blocks: the shape of a tile tells which thread sums what, and so the sum's last bits.
        wide = tl.reshape(normed.to(tl.float32), (BLOCKS_MAX, BLOCK))
        blocks = tl.arange(0, BLOCKS_MAX)
        narrow, by_block = quantize_tile(wide)
        columns_of_blocks = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(out + row * out_stride + columns_of_blocks, narrow, mask=columns_of_blocks < SIZE)
        blocks_count: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
        tl.store(scales + row * blocks_count + blocks, by_block, mask=blocks < blocks_count)
    else:
        tl.store(out + row * out_stride + columns, normed, mask=inside)
