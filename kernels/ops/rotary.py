"""Rotary positions: pairs of dimensions turned by angles that grow with the position (arXiv 2104.09864)."""

import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import compiled, flat, runs_compiled
from kernels.ops.rotary_kernel import rotate_kernel


def rotation(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[tokens, pairs]` of `positions [tokens]` by `frequencies [pairs]`, times `scale`."""
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies
    return angles.cos() * scale, angles.sin() * scale


def rotate_reference(
    hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool = True
) -> torch.Tensor:
    """What `rotate` makes of `hidden`, in torch."""
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    wide = hidden.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    together = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return together.to(hidden.dtype)


def rotate(
    hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool = True
) -> None:
    """Turn `hidden [tokens, heads, 2 * pairs]` in place: pairs are neighbours, or else halves apart."""
    tokens_count, _, size = hidden.shape
    if not cosines.shape == sines.shape == (tokens_count, size // 2) or size % 2:
        raise ValueError(f"turns of {list(cosines.shape)} do not fit {list(hidden.shape)}")
    if runs_kernel(hidden):
        rotate_kernel(hidden, cosines, sines, interleaved)
    elif runs_compiled(hidden):
        layout = (*hidden.shape[:2], *hidden.stride()[:2])
        _rotate_rows(flat(hidden), layout, cosines.numpy(), sines.numpy(), interleaved)
    else:
        hidden.copy_(rotate_reference(hidden, cosines, sines, interleaved))


@compiled("void(float32[::1], UniTuple(intp, 4), float32[:, ::1], float32[:, ::1], boolean)")
def _rotate_rows(hidden, layout, cosines, sines, interleaved):
    tokens_count, heads_count, token_stride, head_stride = layout
    pairs_count = cosines.shape[1]
    for token in range(tokens_count):
        for head in range(heads_count):
            begin = token * token_stride + head * head_stride
            row = hidden[begin : begin + 2 * pairs_count]
            if interleaved:
                for pair in range(pairs_count):
                    first, second = row[2 * pair], row[2 * pair + 1]
                    row[2 * pair] = first * cosines[token, pair] - second * sines[token, pair]
                    row[2 * pair + 1] = first * sines[token, pair] + second * cosines[token, pair]
            else:
                for pair in range(pairs_count):
                    first, second = row[pair], row[pairs_count + pair]
                    row[pair] = first * cosines[token, pair] - second * sines[token, pair]
                    row[pairs_count + pair] = first * sines[token, pair] + second * cosines[token, pair]
