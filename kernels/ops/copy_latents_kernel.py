"""`gather_latents` and `scatter_latents` on a GPU: one token in four layers a program, in lines of 16 bytes.

Programs take layers together rather than tokens, for the slot of a token is the same in all layers.
"""

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.fp8_sizes import tiles_count
from kernels.ops.latent_format_kernel import TILE, scaled_to_e4m3
from kernels.ops.narrow import to_bfloat16, to_dtype

LAYERS_MAX = 4  # of one program, a warp each


def gather_latents_kernel(
    latents: torch.Tensor, slots: torch.Tensor, out: torch.Tensor, value_dim: int
) -> None:
    """As `gather_latents`, in one launch."""
    _carry(latents, out, slots, value_dim, scatters=False)


def scatter_latents_kernel(
    rows: torch.Tensor, slots: torch.Tensor, latents: torch.Tensor, value_dim: int
) -> None:
    """As `scatter_latents`, in one launch."""
    _carry(rows, latents, slots, value_dim, scatters=True)


def _carry(
    source: torch.Tensor, target: torch.Tensor, slots: torch.Tensor, value_dim: int, scatters: bool
) -> None:
    if source.dim() == 2:
        source, target = source.unsqueeze(0), target.unsqueeze(0)
    layers_count = source.shape[0]
    layers = min(triton.next_power_of_2(max(layers_count, 1)), LAYERS_MAX)
    strides = (*source.stride()[:2], *target.stride()[:2], slots.stride(0))
    if source.dtype == target.dtype:
        kernel, size = _copy_rows, source.shape[2]
        layout = (size, triton.next_power_of_2(size))
    else:
        packs = target.dtype == torch.uint8
        kernel, size = (_pack_rows, source.shape[2]) if packs else (_unpack_rows, target.shape[2])
        tiles = tiles_count(value_dim)
        position_dim = size - value_dim
        widths = (triton.next_power_of_2(tiles), triton.next_power_of_2(max(position_dim, 1)))
        layout = (value_dim, tiles, widths[0], position_dim, widths[1])
    grid = (len(slots), triton.cdiv(layers_count, layers))
    kernel[grid](source, target, slots, *strides, layers_count, layers, scatters, *layout, num_warps=layers)


@triton.jit
def _rows_of(slots, slots_stride, SCATTERS: tl.constexpr):
    """Where this program's token comes from and goes to; one of them negative if it is to be skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_stride).to(tl.int64)
    if SCATTERS:
        return token, slot
    else:
        return slot, token


@triton.jit
def _copy_rows(
    source,
    target,
    slots,
    source_layer_stride,
    source_stride,
    target_layer_stride,
    target_stride,
    slots_stride,
    layers_count,
    LAYERS: tl.constexpr,
    SCATTERS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    source_row, target_row = _rows_of(slots, slots_stride, SCATTERS)
    if (source_row < 0) | (target_row < 0):
        return
    layer = (tl.program_id(1) * LAYERS + tl.arange(0, LAYERS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (layer < layers_count) & (column < SIZE)
    read = source + source_row * source_stride + layer * source_layer_stride
    write = target + target_row * target_stride + layer * target_layer_stride
    tl.store(write + column, tl.load(read + column, mask=inside), mask=inside)


@triton.jit
def _pack_rows(
    source,
    target,
    slots,
    source_layer_stride,
    source_stride,
    target_layer_stride,
    target_stride,
    slots_stride,
    layers_count,
    LAYERS: tl.constexpr,
    SCATTERS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILES_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    POSITION_DIM: tl.constexpr,
    POSITION_WIDTH: tl.constexpr,
):
    source_row, target_row = _rows_of(slots, slots_stride, SCATTERS)
    if (source_row < 0) | (target_row < 0):
        return
    source += source_row * source_stride
    target += target_row * target_stride
    layer, tile = _layers_and_tiles(LAYERS, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (layer < layers_count)[:, None] & (column < VALUE_DIM)
    read = source + (layer * source_layer_stride)[:, None] + column
    codes, scales = scaled_to_e4m3(tl.load(read, mask=inside, other=0.0).to(tl.float32))
    write = target + layer * target_layer_stride
    tl.store(write[:, None] + column, codes, mask=inside)
    scales_at = (write + VALUE_DIM).to(tl.pointer_type(tl.float32))
    tl.store(scales_at + tile, scales, mask=(layer < layers_count) & (tile < TILES_COUNT))

    layer, column, inside = _positions(layers_count, LAYERS, POSITION_DIM, POSITION_WIDTH)
    read = source + layer * source_layer_stride + VALUE_DIM + column
    position = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    write = target + layer * target_layer_stride + VALUE_DIM + 4 * TILES_COUNT
    tl.store(write.to(tl.pointer_type(tl.bfloat16)) + column, to_bfloat16(position), mask=inside)


@triton.jit
def _unpack_rows(
    source,
    target,
    slots,
    source_layer_stride,
    source_stride,
    target_layer_stride,
    target_stride,
    slots_stride,
    layers_count,
    LAYERS: tl.constexpr,
    SCATTERS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILES_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    POSITION_DIM: tl.constexpr,
    POSITION_WIDTH: tl.constexpr,
):
    source_row, target_row = _rows_of(slots, slots_stride, SCATTERS)
    if (source_row < 0) | (target_row < 0):
        return
    dtype: tl.constexpr = target.dtype.element_ty
    source += source_row * source_stride
    target += target_row * target_stride
    layer, tile = _layers_and_tiles(LAYERS, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (layer < layers_count)[:, None] & (column < VALUE_DIM)
    read = source + layer * source_layer_stride
    codes = tl.load(read[:, None] + column, mask=inside, other=0)
    scales_at = (read + VALUE_DIM).to(tl.pointer_type(tl.float32))
    scales = tl.load(scales_at + tile, mask=(layer < layers_count) & (tile < TILES_COUNT), other=0.0)
    value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scales[:, None]
    write = target + (layer * target_layer_stride)[:, None] + column
    tl.store(write, to_dtype(value, dtype), mask=inside)

    layer, column, inside = _positions(layers_count, LAYERS, POSITION_DIM, POSITION_WIDTH)
    read = source + layer * source_layer_stride + VALUE_DIM + 4 * TILES_COUNT
    position = tl.load(read.to(tl.pointer_type(tl.bfloat16)) + column, mask=inside, other=0.0)
    write = target + layer * target_layer_stride + VALUE_DIM + column
    tl.store(write, to_dtype(position.to(tl.float32), dtype), mask=inside)


@triton.jit
def _layers_and_tiles(LAYERS: tl.constexpr, TILES: tl.constexpr):
    """This program's layers, and the tiles of each, as one list."""
    number = tl.arange(0, LAYERS * TILES)
    return (tl.program_id(1) * LAYERS + number // TILES).to(tl.int64), number % TILES


@triton.jit
def _positions(layers_count, LAYERS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """This program's layers, the numbers of a rotated key, and which of both there are."""
    layer = (tl.program_id(1) * LAYERS + tl.arange(0, LAYERS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    return layer, column, (layer < layers_count) & (column < DIM)
