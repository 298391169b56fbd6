"""Root-mean-square norm: `x / sqrt(mean(x²) + eps) * weight`."""

import torch
from torch.nn import functional


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm of the last dimension of `hidden [..., size]` in float32, returned in its dtype."""
    if hidden.dtype == torch.float32:
        return functional.rms_norm(hidden, weight.shape, weight, eps)
    wide = functional.rms_norm(hidden.float(), weight.shape, eps=eps)
    return wide.to(hidden.dtype) * weight
