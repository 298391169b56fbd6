"""Tiles of latents in kernels: numbers as they are, or packed FP8, unpacked on the way to a product."""

from typing import NamedTuple

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.fp8_sizes import TILE_NUMBERS, tiles_count
from kernels.ops.narrow import to_dtype

SCALED = tl.constexpr(TILE_NUMBERS)  # numbers that share a scale


class LatentParts(NamedTuple):
    """Views `[pages, page tokens, numbers]` of the same memory; without scales the last is any."""

    values: torch.Tensor
    positions: torch.Tensor
    scales: torch.Tensor


def parts_of(latents: torch.Tensor, value_dim: int) -> LatentParts:
    """Where values, positions and scales of `latents [pages, page tokens, row]` lie."""
    if latents.dtype != torch.uint8:
        return LatentParts(latents[..., :value_dim], latents[..., value_dim:], latents)
    scales_end = value_dim + 4 * tiles_count(value_dim)
    return LatentParts(
        latents[..., :value_dim].view(torch.float8_e4m3fn),
        latents[..., scales_end:].view(torch.bfloat16),
        latents[..., value_dim:scales_end].view(torch.float32),
    )


@triton.jit
def within(mask, columns, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """`mask`, narrowed to columns that are there."""
    if SIZE == WIDTH:
        return mask
    else:
        return mask & (columns < SIZE)


@triton.jit
def _load_part(
    part, inside, STRIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr
):
    """A tile `[tokens, WIDTH]` of latents, zeros for tokens that are not `inside [tokens]`."""
    columns = tl.arange(0, WIDTH)
    at = tl.arange(0, inside.shape[0])[:, None] * STRIDE + columns
    numbers = tl.load(part + at, mask=within(inside[:, None], columns, SIZE, WIDTH), other=0.0)
    if part.dtype.element_ty != dtype:
        numbers = to_dtype(numbers.to(tl.float32), dtype)
    return numbers


@triton.jit
def _load_packed(
    values, scales, inside, STRIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr
):
    """As `_load_part`, of E4M3 values and their scales."""
    TILE: tl.constexpr = SCALED if WIDTH > SCALED else WIDTH
    tokens, tiles = tl.arange(0, inside.shape[0]), tl.arange(0, WIDTH // TILE)
    columns = tiles[:, None] * TILE + tl.arange(0, TILE)
    mask = within(inside[:, None, None], columns, SIZE, WIDTH)
    numbers = tl.load(values + (tokens[:, None, None] * STRIDE + columns), mask=mask, other=0.0)
    mask = within(inside[:, None], tiles * TILE, SIZE, WIDTH)
    by = tl.load(scales + (tokens[:, None] * (STRIDE // 4) + tiles), mask=mask, other=0.0)
    return to_dtype(tl.reshape(numbers.to(tl.float32) * by[:, :, None], (inside.shape[0], WIDTH)), dtype)


@triton.jit
def load_latents(
    values,
    positions,
    scales,
    page,
    slot,
    inside,
    page_stride,
    STRIDE: tl.constexpr,
    VALUE: tl.constexpr,
    POSITION: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    POSITION_WIDTH: tl.constexpr,
    dtype: tl.constexpr,
):
    """Values and positions of the tokens from `slot` of a page on; strides count numbers of `values`."""
    at = page * page_stride + slot * STRIDE
    if values.dtype.element_ty == tl.float8e4nv:
        value = _load_packed(values + at, scales + at // 4, inside, STRIDE, VALUE, VALUE_WIDTH, dtype)
        half = page * (page_stride // 2) + slot * (STRIDE // 2)  # bfloat16 takes two bytes
        return value, _load_part(positions + half, inside, STRIDE // 2, POSITION, POSITION_WIDTH, dtype)
    else:
        value = _load_part(values + at, inside, STRIDE, VALUE, VALUE_WIDTH, dtype)
        return value, _load_part(positions + at, inside, STRIDE, POSITION, POSITION_WIDTH, dtype)
