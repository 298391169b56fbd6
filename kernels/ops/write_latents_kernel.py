"""`write_latents` on a GPU: one warp a token, from the projection to the page without a stop in memory."""

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.fp8_sizes import tiles_count
from kernels.ops.latent_format_kernel import TILE, scaled_to_e4m3
from kernels.ops.narrow import to_dtype
from kernels.ops.rotary_kernel import turn_rows

WARP_TILES = 8  # tiles of 128 numbers that a warp holds without spilling


def write_latents_kernel(
    down: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    interleaved: bool,
    slots: torch.Tensor,
    latents: torch.Tensor,
) -> None:
    """As `write_latents`, in one launch."""
    value_dim = norm_weight.shape[0]
    tiles = triton.next_power_of_2(tiles_count(value_dim))
    pairs_count = (down.shape[1] - value_dim) // 2
    layout = (value_dim, tiles_count(value_dim), tiles, pairs_count, triton.next_power_of_2(pairs_count))
    strides = [tensor.stride(0) for tensor in (down, cosines, sines, slots, latents)]
    _write_latent[(down.shape[0],)](
        down,
        norm_weight,
        cosines,
        sines,
        slots,
        latents,
        eps,
        *strides,
        *layout,
        interleaved,
        latents.dtype == torch.uint8,
        num_warps=triton.cdiv(tiles, WARP_TILES),
    )


@triton.jit
def _write_latent(
    down,
    weight,
    cosines,
    sines,
    slots,
    latents,
    eps,
    down_stride,
    cosines_stride,
    sines_stride,
    slots_stride,
    latents_stride,
    VALUE_DIM: tl.constexpr,
    TILES_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PACKED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_stride).to(tl.int64)
    used = slot >= 0  # asked by writes alone, for reads need not wait for the slot then
    row = down + token * down_stride
    page = latents + slot * latents_stride
    if PACKED:
        position = (page + VALUE_DIM + 4 * TILES_COUNT).to(tl.pointer_type(tl.bfloat16))
    else:
        position = page + VALUE_DIM
    tile = tl.arange(0, TILES)
    number = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = number < VALUE_DIM
    value = tl.load(row + number, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(weight + number, mask=inside, other=0.0).to(tl.float32)

    one = tl.arange(0, 1)
    source = row + VALUE_DIM + one
    cosines += token * cosines_stride
    sines += token * sines_stride
    turn_rows(source, position + one, one == 0, used, cosines, sines, 1, PAIRS, PAIRS_WIDTH, INTERLEAVED)

    dtype: tl.constexpr = down.dtype.element_ty
    scale = tl.rsqrt(tl.sum(value * value) / VALUE_DIM + eps)
    normed = to_dtype(value * scale, dtype).to(tl.float32)  # rounded before the weight, as in torch
    value = to_dtype(normed * by, dtype).to(tl.float32)
    if PACKED:
        codes, scales = scaled_to_e4m3(value)
        scales_at = (page + VALUE_DIM).to(tl.pointer_type(tl.float32))
        if used:
            tl.store(page + number, codes, mask=inside)
            tl.store(scales_at + tile, scales, mask=tile < TILES_COUNT)
    elif used:
        tl.store(page + number, to_dtype(value, latents.dtype.element_ty), mask=inside)
