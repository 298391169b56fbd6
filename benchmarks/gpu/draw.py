"""Random numbers for inputs, from generators of their own.

A recording that fails can leave torch's own generator as if it were still recorded, and then nothing can be
drawn from it any more.
"""

from functools import cache

import torch

TILE_ROWS = 1 << 16


@cache
def generator(device: torch.device) -> torch.Generator:
    """The one of a device, always with the same seed."""
    return torch.Generator(device).manual_seed(20)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal numbers; FP8 ones are rounded from float32."""
    drawn = torch.float32 if dtype == torch.float8_e4m3fn else dtype
    return torch.randn(shape, dtype=drawn, device=device, generator=generator(device)).to(dtype)


def integers(below: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Integers from zero on, int64."""
    return torch.randint(below, shape, device=device, generator=generator(device))


def shuffled(count: int, device: torch.device) -> torch.Tensor:
    """All integers below a number in some order, int64."""
    return torch.randperm(count, device=device, generator=generator(device))


def choices(tokens: int, experts: int, each: int, device: torch.device) -> torch.Tensor:
    """Different experts for each token, `[tokens, each]` int64, all equally likely."""
    scores = torch.rand(tokens, experts, device=device, generator=generator(device))
    return scores.topk(each, dim=1).indices


def tiled_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """So many rows, the given ones again and again: random numbers are dear where gigabytes are needed."""
    repeats = -(-count // len(rows))
    return rows.repeat(repeats, *(1 for _ in rows.shape[1:]))[:count]
