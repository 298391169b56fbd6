"""FP8 numbers in blocks: weight = q x s, one float32 s for each block of rows by columns.

With block (br, bc) and q `[rows, columns]` (float8_e4m3fn), s is `[ceil(rows / br), ceil(columns / bc)]`:
blocks at the right and lower edge may be ragged. Checkpoints call s `weight_scale_inv`.
"""

import torch
import torch.nn.functional as F

from kernels.ops.backend import runs_kernel
from kernels.ops.fp8_sizes import scale_shape
from kernels.ops.quantize_kernel import quantize_rows_kernel

E4M3_MAX = 448.0
ROW_BLOCK = (1, 128)  # of activations, each token by itself


def dequantize_blocks(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Weight `[rows, columns]` in `dtype` from FP8 and its scales, multiplied in float32 and rounded once."""
    _check_shapes(weight, scale_inv, block)
    rows = weight.shape[0]
    scales = scale_inv.float().repeat_interleave(block[0], dim=0)[:rows]
    values = weight.float()
    for index in range(scale_inv.shape[1]):
        start = index * block[1]
        values[:, start : start + block[1]] *= scales[:, index : index + 1]
    return values.to(dtype)


def quantize_blocks(
    weight: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 weight `[rows, columns]` and float32 scales, such that each block's largest number becomes 448."""
    rows, columns = weight.shape
    rows_of_blocks, columns_of_blocks = scale_shape(rows, columns, block)
    padding = (0, columns_of_blocks * block[1] - columns, 0, rows_of_blocks * block[0] - rows)
    padded = F.pad(weight.float(), padding).view(rows_of_blocks, block[0], columns_of_blocks, block[1])
    largest = padded.abs().amax(dim=(1, 3))
    scale_inv = largest / E4M3_MAX
    scale_inv = torch.where(scale_inv > 0, scale_inv, 1.0)  # of zeros, or so small that the quotient is zero
    # A scale near 1e-45 has lost its digits; what is then too large for FP8 would become NaN.
    quotient = (padded / scale_inv[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    flat = quotient.reshape(rows_of_blocks * block[0], columns_of_blocks * block[1])[:rows, :columns]
    return flat.contiguous().to(torch.float8_e4m3fn), scale_inv


def quantize_rows_reference(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_rows` computes, in torch."""
    return quantize_blocks(hidden, ROW_BLOCK)


def quantize_rows(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden [rows, size]` in FP8 E4M3 with float32 scales `[rows, ceil(size / 128)]`, row by row."""
    if hidden.dim() != 2 or (hidden.stride(1) != 1 and hidden.shape[1] > 1):
        raise ValueError(
            f"hidden is {list(hidden.shape)} with strides {list(hidden.stride())}: "
            "give [rows, size], rows of numbers side by side"
        )
    if runs_kernel(hidden):
        return quantize_rows_kernel(hidden)
    return quantize_rows_reference(hidden)


def _check_shapes(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> None:
    if weight.dim() != 2 or tuple(scale_inv.shape) != scale_shape(*weight.shape, block):
        raise ValueError(
            f"scale_inv is {list(scale_inv.shape)} for weight {list(weight.shape)} in blocks {list(block)}; "
            "give one scale for each block, ragged ones at the edge included"
        )
