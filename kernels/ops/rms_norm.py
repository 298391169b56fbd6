"""Root-mean-square norm: `x / sqrt(mean(x²) + eps) * weight`."""

import numpy as np
import torch
from torch.nn import functional

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import compiled, flat, runs_compiled
from kernels.ops.rms_norm_kernel import rms_norm_kernel


def rms_norm_reference(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What `rms_norm` computes, in torch."""
    wide = functional.rms_norm(hidden.float(), weight.shape, eps=eps)
    return wide.to(hidden.dtype) * weight


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Norm of each row of `hidden [rows, size]` in float32, returned in its dtype; `out` may be `hidden`."""
    if hidden.dim() != 2 or weight.shape != hidden.shape[1:]:
        raise ValueError(f"a norm of {list(weight.shape)} does not fit rows of {list(hidden.shape)}")
    if runs_kernel(hidden):
        return rms_norm_kernel(hidden, weight, eps, out)
    if out is None:
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if runs_compiled(hidden) and runs_compiled(out):
        _norm_rows(flat(hidden), hidden.stride(0), len(hidden), weight.numpy(), eps, flat(out), out.stride(0))
        return out
    return out.copy_(rms_norm_reference(hidden, weight, eps))


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
