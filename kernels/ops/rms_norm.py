"""Root-mean-square norm: `x / sqrt(mean(x²) + eps) * weight`, alone and with what stands before and after it.

In a layer a residual grows before the norm, and an FP8 product follows it: on a GPU all three are one launch.
"""

import numpy as np
import torch
from torch.nn import functional

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import compiled, flat, runs_compiled
from kernels.ops.quantize import quantize_rows, quantize_rows_reference
from kernels.ops.rms_norm_kernel import (
    add_rms_norm_kernel,
    add_rms_norm_quantize_kernel,
    rms_norm_kernel,
    rms_norm_quantize_kernel,
)


def rms_norm_reference(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What `rms_norm` computes, in torch."""
    wide = functional.rms_norm(hidden.float(), weight.shape, eps=eps)
    return wide.to(hidden.dtype) * weight


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Norm of each row of `hidden [rows, size]` in float32, returned in its dtype; `out` may be `hidden`."""
    _check(hidden, weight)
    if runs_kernel(hidden):
        return rms_norm_kernel(hidden, weight, eps, out)
    if out is None:
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if runs_compiled(hidden) and runs_compiled(out):
        _norm_rows(flat(hidden), hidden.stride(0), len(hidden), weight.numpy(), eps, flat(out), out.stride(0))
        return out
    return out.copy_(rms_norm_reference(hidden, weight, eps))


def add_rms_norm_reference(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """What `add_rms_norm` computes, in torch."""
    return rms_norm_reference(residual.add_(hidden), weight, eps)


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add `hidden [rows, size]` to `residual` in place, rounded once, and return the norm of the sum."""
    _check(hidden, weight, residual)
    if runs_kernel(hidden):
        return add_rms_norm_kernel(hidden, residual, weight, eps)
    return rms_norm(residual.add_(hidden), weight, eps)


def rms_norm_quantize_reference(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rms_norm_quantize` computes, in torch."""
    return quantize_rows_reference(rms_norm_reference(hidden, weight, eps).to(hidden.dtype))


def rms_norm_quantize(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm`, rounded to the type of `hidden`, then as `quantize_rows` gives it: FP8 and scales."""
    _check(hidden, weight)
    if runs_kernel(hidden):
        return rms_norm_quantize_kernel(hidden, weight, eps)
    return quantize_rows(rms_norm(hidden, weight, eps))


def add_rms_norm_quantize_reference(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `add_rms_norm_quantize` computes, in torch."""
    return rms_norm_quantize_reference(residual.add_(hidden), weight, eps)


def add_rms_norm_quantize(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `hidden` to `residual` in place as `add_rms_norm`; of the sum, what `rms_norm_quantize` gives."""
    _check(hidden, weight, residual)
    if runs_kernel(hidden):
        return add_rms_norm_quantize_kernel(hidden, residual, weight, eps)
    return rms_norm_quantize(residual.add_(hidden), weight, eps)


def _check(hidden: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    if hidden.dim() != 2 or weight.shape != hidden.shape[1:]:
        raise ValueError(f"a norm of {list(weight.shape)} does not fit rows of {list(hidden.shape)}")
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(f"a residual of {list(residual.shape)} does not fit rows of {list(hidden.shape)}")


@compiled("void(float32[::1], intp, intp, float32[::1], float32, float32[::1], intp)", any_order=True)
def _norm_rows(hidden, stride, rows_count, weight, eps, out, out_stride):
    size = len(weight)
    for row in range(rows_count):
        numbers = hidden[row * stride : row * stride + size]
        normed = out[row * out_stride : row * out_stride + size]
        squares = np.float32(0)
        for column in range(size):
            squares += numbers[column] * numbers[column]
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
        for column in range(size):
            normed[column] = numbers[column] * scale * weight[column]
