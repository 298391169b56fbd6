"""Weights as a model holds them, plain or FP8, and products by either."""

from collections.abc import Sequence

import torch

from kernels.ops.linear import linear, packed
from kernels.ops.linear_fp8 import WEIGHT_BLOCK, Fp8Rows, Fp8Weight, linear_fp8_of
from kernels.ops.quantize import dequantize_blocks
from kernels.ops.rms_norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize

Weight = torch.Tensor | Fp8Weight
Rows = torch.Tensor | Fp8Rows


def project(hidden: Rows, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`hidden [rows, in] @ weight [out, in].T + bias`, a row with the same bits in any batch."""
    if not isinstance(weight, Fp8Weight):
        return linear(hidden, weight, bias)
    out = linear_fp8_of(hidden, weight)
    return out if bias is None else out + bias


def normed_for(
    weight: Weight, hidden: torch.Tensor, norm: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> Rows:
    """Norm of `hidden [rows, in]`, or of `residual`, which grows by it, as `project` by `weight` takes it.

    For an FP8 weight it leaves the norm's launch as FP8, and has no other form.
    """
    if is_fp8(weight):
        given = (norm, eps) if residual is None else (residual, norm, eps)
        quantise = rms_norm_quantize if residual is None else add_rms_norm_quantize
        return Fp8Rows(*quantise(hidden, *given), hidden.dtype)
    if residual is None:
        return rms_norm(hidden, norm, eps)
    return add_rms_norm(hidden, residual, norm, eps)


def prepared(weight: Weight) -> Weight:
    """A weight as `project` multiplies by it fastest."""
    return weight if isinstance(weight, Fp8Weight) else packed(weight)


def plain(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight `[out, in]` in `dtype`, multiplied by its scales if it has any."""
    if not isinstance(weight, Fp8Weight):
        return weight.to(dtype)
    return dequantize_blocks(weight.weight, weight.scales, WEIGHT_BLOCK, dtype)


def joined(weights: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """Weights of the same inputs one below the other; FP8 where all are, and no block would be of two."""
    fits = all(is_fp8(weight) for weight in weights)
    if fits and all(len(weight.weight) % WEIGHT_BLOCK[0] == 0 for weight in weights[:-1]):
        codes = torch.cat([weight.weight.view(torch.uint8) for weight in weights])
        scales = torch.cat([weight.scales for weight in weights])
        return Fp8Weight(codes.view(torch.float8_e4m3fn), scales)
    return torch.cat([plain(weight, dtype) for weight in weights])


def moved(weight: Weight, device: torch.device | str) -> Weight:
    """The same weight on a device."""
    if not isinstance(weight, Fp8Weight):
        return weight.to(device)
    return Fp8Weight(weight.weight.to(device), weight.scales.to(device))


def is_fp8(weight: Weight) -> bool:
    """Whether a weight is kept in FP8."""
    return isinstance(weight, Fp8Weight)
