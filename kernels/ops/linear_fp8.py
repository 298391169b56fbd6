"""Products of FP8 rows by FP8 weights: `out[r, o] = Σ hidden[r, k] * weight[o, k]`, scales applied.

Rows have a float32 scale for each 128 of their numbers, weights one for each block of 128 x 128, as in the
published DeepSeek-V3. Sums are float32: within a block of 128 as the chip makes them, beyond it truly so.
"""

from dataclasses import dataclass

import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.fp8_sizes import WEIGHT_BLOCK, scale_shape
from kernels.ops.linear import linear
from kernels.ops.linear_fp8_kernel import linear_fp8_kernel
from kernels.ops.quantize import ROW_BLOCK, dequantize_blocks, quantize_blocks, quantize_rows


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight `[out, in]` in FP8 E4M3, and its float32 scales `[ceil(out / 128), ceil(in / 128)]`."""

    weight: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Fp8Weight":
        """From a weight `[out, in]` of any floating type, rounded to FP8."""
        return cls(*quantize_blocks(weight, WEIGHT_BLOCK))


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows `[rows, in]` in FP8 E4M3, their float32 scales `[rows, ceil(in / 128)]`, and the type they had."""

    numbers: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, hidden: torch.Tensor) -> "Fp8Rows":
        """From rows of any floating type, rounded to FP8."""
        return cls(*quantize_rows(hidden), hidden.dtype)


def linear_fp8_reference(
    hidden: torch.Tensor,
    hidden_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What `linear_fp8` computes, in torch: everything float32, then rounded once."""
    wide = dequantize_blocks(hidden, hidden_scales, ROW_BLOCK)
    return linear(wide, dequantize_blocks(weight, weight_scales, WEIGHT_BLOCK)).to(dtype)


def linear_fp8(
    hidden: torch.Tensor,
    hidden_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`hidden [rows, in]` by `weight [out, in]`, both FP8, `[rows, out]` of `dtype`; rows as in `linear`."""
    _check(hidden, hidden_scales, ROW_BLOCK, "hidden")
    _check(weight, weight_scales, WEIGHT_BLOCK, "weight")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"weight {list(weight.shape)} does not fit rows of {list(hidden.shape)}")
    if runs_kernel(hidden):
        return linear_fp8_kernel(hidden, hidden_scales, weight, weight_scales, dtype)
    return linear_fp8_reference(hidden, hidden_scales, weight, weight_scales, dtype)


def linear_fp8_of(hidden: torch.Tensor | Fp8Rows, weight: Fp8Weight) -> torch.Tensor:
    """`hidden [rows, in]`, rounded to FP8 unless it is, by `weight`, `[rows, out]` in the type it had."""
    rows = hidden if isinstance(hidden, Fp8Rows) else Fp8Rows.of(hidden)
    return linear_fp8(rows.numbers, rows.scales, weight.weight, weight.scales, rows.dtype)


def _check(numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], name: str) -> None:
    if numbers.dim() != 2 or numbers.dtype != torch.float8_e4m3fn or numbers.stride(1) != 1:
        raise ValueError(
            f"{name} is {list(numbers.shape)} of {numbers.dtype} with strides {list(numbers.stride())}: "
            "give a matrix of float8_e4m3fn, rows of numbers side by side"
        )
    if scales.dtype != torch.float32 or tuple(scales.shape) != scale_shape(*numbers.shape, block):
        raise ValueError(
            f"scales of {name} are {list(scales.shape)} of {scales.dtype}: give float32, "
            f"one for each block of {block[0]} x {block[1]} in {list(numbers.shape)}"
        )
