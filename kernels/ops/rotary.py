"""Rotary positions: pairs of dimensions turned by angles that grow with the position (arXiv 2104.09864)."""

import torch


def rotation(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[tokens, pairs]` of `positions [tokens]` by `frequencies [pairs]`, times `scale`."""
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies
    return angles.cos() * scale, angles.sin() * scale


def rotate(
    hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool = True
) -> torch.Tensor:
    """Turn `hidden [tokens, ..., 2 * pairs]`: pairs are neighbours if interleaved, else halves apart."""
    shape = (hidden.shape[0], *(1 for _ in hidden.shape[1:-1]), cosines.shape[1])
    cosines, sines = cosines.view(shape), sines.view(shape)
    wide = hidden.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    together = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return together.to(hidden.dtype)
