"""`experts_contiguous` and `experts_masked` on a GPU: two grouped products, gate and up together, then down.

Sizes of tiles follow from shapes alone, so that nothing waits for the GPU. Batch invariance: a row's sums run
in the same steps and order in tiles of every size, and no number of another row enters them. Company of the
same size therefore never changes a row's bits. Company of another size may bring tiles of another size, and
then this holds as far as tensor cores add alike on either side and in any width of an instruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.grouped_gemm_kernel import down_tile, gate_up_tile
from kernels.ops.quantize_kernel import (
    BLOCK,
    BLOCKS_PER_PROGRAM_MAX,
    quantised_rows_like,
    quantize_blocks_at,
    quantize_rows_kernel,
)

EXPERTS_WIDTH_MIN = 32  # a warp has as many lanes: fewer would only be one more program to compile
QUANTISING_PROGRAMS = 8192  # four times what the largest Hopper GPU holds at once, since buffers differ
STEPS = {torch.float32: 64, torch.bfloat16: 64, torch.float8_e4m3fn: 128}  # by the weights' dtype


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Where the weights of each expert are, as kernels read it: whoever makes it keeps them there.

    `addresses [experts, 4]` int64, on the device: of gate and up, of down, and of the scales of either, or 0.
    All experts have the same sizes and `dtype`, and their weights begin at multiples of 16 bytes.
    """

    addresses: torch.Tensor
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype

    @property
    def experts_count(self) -> int:
        """How many experts it leads to."""
        return len(self.addresses)

    @property
    def is_quantised(self) -> bool:
        """Whether weights are FP8 with scales."""
        return self.dtype == torch.float8_e4m3fn


def addresses_of(parts: Sequence[torch.Tensor]) -> list[int]:
    """The row of a table for one expert: `gate_up`, `down`, and the scales of either if it has any."""
    addresses = [part.data_ptr() for part in parts]
    if any(address % 16 for address in addresses[:2]):
        raise ValueError("an expert's weights begin between multiples of 16 bytes: give tensors of their own")
    return [*addresses, 0, 0][:4]


@dataclass(frozen=True, slots=True)
class Tile:
    """How one launch is cut: `columns` of the output, which are rows of the weights, for some tokens."""

    tokens: int
    columns: int
    warps: int
    stages: int
    weights_left: bool = False


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the two launches are cut, up to so many slots an expert."""

    slots_max: float
    gate_up: Tile
    down: Tile


# Few slots: reading weights is all there is, two or three programs share a processor. Many: products are.
# A program of FP8 quantises whole groups of 128 columns, and 64 tokens are what its registers bear.
FEW, SOME = 16, 48
TILES = {
    torch.float32: (Tiles(float("inf"), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),),
    torch.bfloat16: (
        Tiles(FEW, Tile(32, 64, 4, 3, weights_left=True), Tile(32, 128, 4, 4, weights_left=True)),
        Tiles(SOME, Tile(64, 128, 8, 4), Tile(64, 128, 4, 4)),
        Tiles(float("inf"), Tile(128, 128, 8, 4), Tile(128, 256, 8, 4)),
    ),
    torch.float8_e4m3fn: (
        Tiles(FEW, Tile(32, 128, 4, 3, weights_left=True), Tile(32, 128, 4, 4, weights_left=True)),
        Tiles(SOME, Tile(64, 128, 8, 4), Tile(64, 128, 8, 4)),
        Tiles(float("inf"), Tile(64, 128, 8, 4), Tile(128, 128, 8, 4)),
    ),
}


def experts_contiguous_kernel(hidden, rows, offsets, table: WeightTable) -> torch.Tensor:
    """As `experts_contiguous`, in two launches, or three with FP8."""
    out, scales = hidden.new_empty(len(rows), hidden.shape[1]), None
    if table.is_quantised:
        hidden, scales = quantize_rows_kernel(hidden)
    tiles = tiles_for(table.dtype, len(rows) / table.experts_count)
    return _multiply(hidden, scales, rows, offsets, 0, table, out, tiles, len(rows))


def experts_masked_kernel(hidden, counts, table: WeightTable, slots_max: int) -> torch.Tensor:
    """As `experts_masked`, in two launches, or three with FP8."""
    out = torch.empty_like(hidden)
    experts_count, capacity, size = hidden.shape
    slots_max = min(slots_max, experts_count * capacity)
    hidden, scales = hidden.view(-1, size), None
    if table.is_quantised:
        hidden, scales = _quantize_counted(hidden, counts, capacity)
    # Buffers are far from full as a rule, and then reading weights is all there is.
    tiles = tiles_for(table.dtype, min(capacity, SOME, slots_max / experts_count))
    _multiply(hidden, scales, None, counts, capacity, table, out.view(-1, size), tiles, slots_max)
    return out


def tiles_for(dtype: torch.dtype, slots_each: float) -> Tiles:
    """How products are cut with weights of `dtype`, for so many slots an expert in the mean."""
    return next(tiles for tiles in TILES[dtype] if slots_each <= tiles.slots_max)


def tiles_count_max(slots_max: int, experts_count: int, capacity: int, tokens: int) -> int:
    """Most tiles of so many tokens that slots can make, however they are spread over experts."""
    spread = (slots_max + min(slots_max, experts_count) * (tokens - 1)) // tokens
    return min(spread, experts_count * triton.cdiv(capacity, tokens)) if capacity else spread


def _multiply(
    hidden, hidden_scales, rows, bounds, capacity, table: WeightTable, out, tiles: Tiles, slots_max: int
) -> torch.Tensor:
    """Launch both products; capacity is 0 where bounds are offsets of slots, not counts in fixed buffers."""
    if hidden.dtype != table.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, weights are {table.dtype}: give both in one type, or FP8"
        )
    slots_count, experts_count = len(out), table.experts_count
    size, intermediate = table.hidden_size, table.intermediate_size
    inner_dtype = out.dtype if hidden_scales is None else torch.float8_e4m3fn
    inner = torch.empty(slots_count, intermediate, dtype=inner_dtype, device=out.device)
    inner_scales = None
    if hidden_scales is not None:
        blocks_count = triton.cdiv(intermediate, BLOCK)
        inner_scales = torch.empty(slots_count, blocks_count, dtype=torch.float32, device=out.device)

    def launch(kernel, tile: Tile, columns_count: int, *tensors) -> None:
        tiles_count = tiles_count_max(slots_max, experts_count, capacity, tile.tokens)
        kernel[(tiles_count * triton.cdiv(columns_count, tile.columns),)](
            *tensors,
            experts_count=experts_count,
            EXPERTS_WIDTH=max(triton.next_power_of_2(experts_count), EXPERTS_WIDTH_MIN),
            CAPACITY=capacity,
            HIDDEN=size,
            INTERMEDIATE=intermediate,
            TOKENS=tile.tokens,
            COLUMNS=tile.columns,
            STEP=STEPS[table.dtype],
            WEIGHTS_LEFT=tile.weights_left,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    wide = (hidden, hidden_scales, rows, bounds, table.addresses, inner, inner_scales, hidden.stride(0))
    launch(gate_up_tile, tiles.gate_up, intermediate, *wide)
    launch(down_tile, tiles.down, size, inner, inner_scales, bounds, table.addresses, out)
    return out


def _quantize_counted(
    hidden: torch.Tensor, counts: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_rows`, of the first `counts [experts]` rows of each `capacity` rows alone."""
    quantised, scales = quantised_rows_like(hidden)
    experts_count, size, blocks_count = len(counts), hidden.shape[1], scales.shape[1]
    width = min(triton.next_power_of_2(blocks_count), BLOCKS_PER_PROGRAM_MAX)
    parts_count = triton.cdiv(blocks_count, width)
    rows_together = min(triton.cdiv(QUANTISING_PROGRAMS, experts_count * parts_count), capacity)
    _quantize_counted_rows[experts_count, parts_count, rows_together](
        counts,
        hidden,
        quantised,
        scales,
        size,
        blocks_count,
        capacity,
        width,
        BLOCK,
        num_warps=max(width // 4, 1),
    )
    return quantised, scales


@triton.jit
def _quantize_counted_rows(
    counts,
    hidden,
    quantised,
    scales,
    size,
    blocks_count,
    capacity,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every so manyth row of one expert's buffer, as far as there are some."""
    expert, first = tl.program_id(0), tl.program_id(1) * WIDTH
    begin = expert.to(tl.int64) * capacity
    for place in range(tl.program_id(2), tl.load(counts + expert), tl.num_programs(2)):
        row = begin + place
        quantize_blocks_at(hidden, quantised, scales, row, first, size, size, blocks_count, WIDTH, BLOCK)
