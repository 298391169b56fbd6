"""`rms_norm` on a GPU: one program a row, which stays in registers between the sum and the product."""

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import to_dtype

WARPS_BY_WIDTH = {512: 1, 2048: 4, 8192: 8}


def rms_norm_kernel(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As `rms_norm`, in one launch."""
    rows_count, size = hidden.shape
    if out is None:
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    width = triton.next_power_of_2(size)
    _norm_row[(rows_count,)](
        hidden, weight, out, hidden.stride(0), out.stride(0), eps, size, width, num_warps=warps_for(width)
    )
    return out


def warps_for(width: int) -> int:
    """Warps that share a row of so many numbers."""
    return next((warps for most, warps in WARPS_BY_WIDTH.items() if width <= most), 16)


@triton.jit
def _norm_row(hidden, weight, out, hidden_stride, out_stride, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < SIZE
    numbers = tl.load(hidden + row * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers) / SIZE + eps)
    dtype: tl.constexpr = out.dtype.element_ty
    normed = to_dtype(numbers * scale, dtype).to(tl.float32)  # rounded before the weight, as in torch
    by = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, to_dtype(normed * by, dtype), mask=inside)
