"""Attention over keys in two parts, merged as if over all of them: `Σ exp(lse_i) out_i / Σ exp(lse_i)`.

A prompt's chunk attends so over its own keys, and over a cached context that is unfolded piece by piece.
"""

import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.merge_attention_kernel import merge_attention_kernel


def merge_attention_reference(
    out_first: torch.Tensor,
    log_sum_exp_first: torch.Tensor,
    out_second: torch.Tensor,
    log_sum_exp_second: torch.Tensor,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `merge_attention` computes, in torch."""
    log_sum_exp = torch.logaddexp(log_sum_exp_first, log_sum_exp_second)
    base = log_sum_exp.clamp_min(torch.finfo(log_sum_exp.dtype).min)
    first, second = (
        (weight * out).masked_fill(weight == 0, 0)  # what weighs nothing may be NaN
        for weight, out in (
            ((log_sum_exp_first - base).exp().unsqueeze(-1), out_first),
            ((log_sum_exp_second - base).exp().unsqueeze(-1), out_second),
        )
    )
    merged = (first + second).to(out_first.dtype)
    if in_place:
        return out_first.copy_(merged), log_sum_exp_first.copy_(log_sum_exp)
    return merged, log_sum_exp


def merge_attention(
    out_first: torch.Tensor,
    log_sum_exp_first: torch.Tensor,
    out_second: torch.Tensor,
    log_sum_exp_second: torch.Tensor,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge outs `[tokens, heads, v]` by natural logarithms `[tokens, heads]` of their sums of exponentials.

    A part whose logarithm is -inf changes not a bit of the other, and may be NaN; two such parts give zeros
    and -inf. The result, of the first's dtype, takes the first's memory if `in_place`. Raises ValueError for
    shapes that differ and for tensors that are not contiguous.
    """
    tensors = (out_first, log_sum_exp_first, out_second, log_sum_exp_second)
    shapes = [list(tensor.shape) for tensor in tensors]
    if shapes[0] != shapes[2] or shapes[1] != shapes[0][:2] or shapes[3] != shapes[1]:
        raise ValueError(f"outs and their sums do not fit each other: {shapes}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("parts of attention are merged where they are contiguous alone: copy them first")
    merge = merge_attention_kernel if runs_kernel(out_first) else merge_attention_reference
    return merge(*tensors, in_place)
