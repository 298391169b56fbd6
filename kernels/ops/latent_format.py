"""Latents as FP8: what attention reads as value in E4M3, with a scale for each 128; the rotated key as it is.

    | value, E4M3 | scales, float32, one for each 128 numbers of value | position, bfloat16 |

which is 512 + 16 + 128 = 656 bytes a token and layer for V3, where bfloat16 takes 1,152 (the layout of
FlashMLA). Scales are powers of two: dividing by them loses nothing.
"""

import torch

from kernels.ops.fp8_sizes import TILE_NUMBERS, tiles_count
from kernels.ops.quantize import E4M3_MAX

SCALE_MIN = 2.0**-100  # of numbers that are all zero, or nearly


def pack_latents_reference(latents: torch.Tensor, value_dim: int) -> torch.Tensor:
    """`latents [tokens, value + position]` to `[tokens, packed_bytes]` uint8."""
    value, position = latents[:, :value_dim].float(), latents[:, value_dim:]
    padded = torch.nn.functional.pad(value, (0, -value_dim % TILE_NUMBERS)).unflatten(1, (-1, TILE_NUMBERS))
    scales = power_of_two_above(padded.abs().amax(dim=-1) / E4M3_MAX)
    quotient = (padded / scales.unsqueeze(-1)).flatten(1)[:, :value_dim].clamp(-E4M3_MAX, E4M3_MAX)
    parts = (quotient.to(torch.float8_e4m3fn), scales, position.to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def power_of_two_above(numbers: torch.Tensor) -> torch.Tensor:
    """The least powers of two that are not below `numbers` float32, and not below 2^-100."""
    bits = numbers.clamp_min(SCALE_MIN).view(torch.int32)
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def unpack_latents_reference(
    packed: torch.Tensor, value_dim: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`packed [tokens, packed_bytes]` uint8 to latents `[tokens, value + position]` in `dtype`."""
    scales_end = value_dim + 4 * tiles_count(value_dim)
    value = packed[:, :value_dim].view(torch.float8_e4m3fn).float()
    scales = packed[:, value_dim:scales_end].contiguous().view(torch.float32)
    position = packed[:, scales_end:].contiguous().view(torch.bfloat16)
    wide = scales.repeat_interleave(TILE_NUMBERS, dim=1)[:, :value_dim]
    return torch.cat([(value * wide).to(dtype), position.to(dtype)], dim=1)
