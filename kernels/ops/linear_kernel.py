"""`linear` and `linear_by_head` on a GPU: tiles of outputs by rows, weights on the left of each product.

A row has the same bits in any company. Its sum is cut into parts that depend on the weight's shape alone; a
part adds its inputs in order, and the parts are added in order. Few rows leave most of the chip without a
tile: then each part has programs of its own, and a second launch adds the parts. Otherwise one program runs
through all parts. What depends on the number of rows is how many of them a tile holds, and how many outputs.

Read from the machine code: a chain of products, 16 inputs each in a tensor core, or one fused product and sum
for each input of float32, and no tile has another order. That a tensor core adds the 16 in the same way
whatever the width of its product is the chip's affair: nothing but a GPU can show it, and tests ask it there.
"""

from typing import NamedTuple

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import dot, to_dtype

PROGRAMS_WANTED = 264  # two for each processor of the largest Hopper GPU; a constant, since bits depend on it
PARTIAL_NUMBERS_MAX = 8 << 20  # 32 MiB of float32, which stay in the chip's cache from one launch to the next
TILE_GROUP = 8  # tiles of rows that pass over the weights together, while these are in the cache
SUM_NUMBERS = 1024


class Cut(NamedTuple):
    """How sums of one type are cut. All that bits depend on besides the weight's shape."""

    step: int
    """Inputs that are added at once."""
    outs: int
    """Outputs of the smallest tile."""
    part_steps_min: int
    """Shorter parts would cost more to add than they save."""
    part_steps_min_of_few: int
    """The same where outputs are so few that next to no part would have a processor."""


class Tile(NamedTuple):
    """What one program computes, with how many warps, and the stages of its pipeline."""

    outs: int
    rows: int
    warps: int
    stages: int


NARROW_CUT = Cut(step=64, outs=128, part_steps_min=12, part_steps_min_of_few=4)
WIDE_CUT = Cut(step=16, outs=32, part_steps_min=16, part_steps_min_of_few=16)
FEW_OUTS_MAX = 512  # those of a gate: four tiles
NARROW_FEW = (Tile(128, 16, 4, 6), Tile(128, 32, 4, 5), Tile(128, 64, 4, 4))
NARROW_MANY, NARROW_MOST = Tile(128, 128, 8, 4), Tile(128, 256, 8, 4)
NARROW_MOST_ROWS_MIN = 1024  # fewer would leave too much of the last of the largest tiles empty
WIDE_FEW, WIDE_MANY = Tile(32, 16, 4, 12), Tile(128, 32, 4, 4)


def linear_kernel(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As `linear`, in one launch, or two with few rows and a weight of few outputs.

    Raises ValueError for what does not fit together.
    """
    (rows_count, in_count), out_count = hidden.shape, len(weight)
    _check(hidden, weight, weight.shape[1:] == (in_count,) and (bias is None or bias.shape == (out_count,)))
    out = torch.empty(rows_count, out_count, dtype=dtype or hidden.dtype, device=hidden.device)
    parts_count = parts_of(out_count, in_count, hidden.dtype)
    tile = tile_of(rows_count, out_count, parts_count, hidden.dtype)
    hidden, weight = hidden.unsqueeze(1), weight.unsqueeze(0)
    if not parts_are_apart(rows_count, out_count, parts_count, tile):
        _launch(hidden, weight, bias, out, tile, parts_count, 1)
        return out
    partial = torch.empty(parts_count, rows_count, out_count, dtype=torch.float32, device=hidden.device)
    _launch(hidden, weight, None, partial, tile, parts_count, parts_count)
    sum_parts(partial, bias, out)
    return out


def linear_by_head_kernel(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `linear_by_head`, in one launch; raises ValueError for what does not fit together."""
    rows_count, heads_count, in_count = hidden.shape
    _check(hidden, weight, weight.shape[::2] == (heads_count, in_count))
    out = hidden.new_empty(rows_count, heads_count, weight.shape[1])
    tile = tile_of(rows_count, heads_count * weight.shape[1], 1, hidden.dtype)
    _launch(hidden, weight, None, out, tile, 1, 1)
    return out


def parts_of(out_count: int, in_count: int, dtype: torch.dtype) -> int:
    """Parts into which a sum over so many inputs is cut: as many steps in each."""
    cut = cut_of(dtype)
    steps_count = triton.cdiv(in_count, cut.step)
    part_steps_min = cut.part_steps_min_of_few if out_count <= FEW_OUTS_MAX else cut.part_steps_min
    most = min(PROGRAMS_WANTED // triton.cdiv(out_count, cut.outs), steps_count // part_steps_min)
    return next((count for count in range(most, 1, -1) if steps_count % count == 0), 1)


def cut_of(dtype: torch.dtype) -> Cut:
    """How sums of products of this type are cut."""
    return WIDE_CUT if dtype == torch.float32 else NARROW_CUT


def tile_of(rows_count: int, out_count: int, parts_count: int, dtype: torch.dtype) -> Tile:
    """The largest tile that rows fill, and of which there are enough for the chip."""
    if dtype == torch.float32:
        return WIDE_FEW if rows_count <= WIDE_FEW.rows and parts_count > 1 else WIDE_MANY
    few = next((tile for tile in NARROW_FEW if rows_count <= tile.rows), None)
    if few:
        return few
    # Of several parts there is a sum beside that of one part, for which the largest tile has no registers.
    fits = parts_count == 1 and rows_count >= NARROW_MOST_ROWS_MIN
    is_wanted = tiles_count(rows_count, out_count, NARROW_MOST) >= PROGRAMS_WANTED
    return NARROW_MOST if fits and is_wanted else NARROW_MANY


def tiles_count(rows_count: int, out_count: int, tile: Tile) -> int:
    """Tiles that cover all rows and outputs."""
    return triton.cdiv(rows_count, tile.rows) * triton.cdiv(out_count, tile.outs)


def parts_are_apart(rows_count: int, out_count: int, parts_count: int, tile: Tile) -> bool:
    """Whether each part of the sums has programs of its own: tiles alone are too few for the chip."""
    fits = parts_count * rows_count * out_count <= PARTIAL_NUMBERS_MAX
    return parts_count > 1 and fits and tiles_count(rows_count, out_count, tile) < PROGRAMS_WANTED // 2


def sum_parts(partial: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """`out [rows, out]` becomes the sum of `partial [parts, rows, out]` float32, in order, and the bias."""
    grid = (triton.cdiv(out.numel(), SUM_NUMBERS),)
    _sum_parts[grid](partial, bias, out, *out.shape, PARTS=len(partial), NUMBERS=SUM_NUMBERS)


def _check(hidden: torch.Tensor, weight: torch.Tensor, fits: bool) -> None:
    if not fits or hidden.dtype != weight.dtype:
        raise ValueError(
            f"weights {list(weight.shape)} of {weight.dtype}, or their bias, "
            f"do not fit {list(hidden.shape)} of {hidden.dtype}"
        )


def _launch(hidden, weight, bias, out, tile: Tile, parts_count: int, programs_of_a_tile: int) -> None:
    rows_count, heads_count, in_count = hidden.shape
    out_count, step = weight.shape[1], cut_of(hidden.dtype).step
    _multiply[tiles_count(rows_count, out_count, tile), programs_of_a_tile, heads_count](
        hidden,
        weight,
        bias,
        out,
        rows_count,
        out_count,
        in_count,
        *hidden.stride(),
        *weight.stride(),
        PARTS=parts_count // programs_of_a_tile,
        STEPS=triton.cdiv(in_count, step) // parts_count,
        IS_WHOLE=in_count % step == 0,
        ROWS=tile.rows,
        OUTS=tile.outs,
        STEP=step,
        TILE_GROUP=TILE_GROUP,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


@triton.jit
def find_tile(rows_count, out_count, ROWS: tl.constexpr, OUTS: tl.constexpr, TILE_GROUP: tl.constexpr):
    """Which tile of rows and of outputs is this program's: a group of tiles of rows takes outputs in turn."""
    program = tl.program_id(0)
    group_size = (out_count + OUTS - 1) // OUTS * TILE_GROUP
    first = program // group_size * TILE_GROUP
    height = tl.minimum((rows_count + ROWS - 1) // ROWS - first, TILE_GROUP)
    inside = program % group_size
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["rows_count"])
def _multiply(
    hidden,
    weight,
    bias,
    out,
    rows_count,
    out_count,
    in_count,
    hidden_row,
    hidden_head,
    hidden_column,
    weight_head,
    weight_row,
    weight_column,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tile, out_tile = find_tile(rows_count, out_count, ROWS, OUTS, TILE_GROUP)
    head = tl.program_id(2).to(tl.int64)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    outs = out_tile * OUTS + tl.arange(0, OUTS)
    # Beyond the end the last row is read again, and not written.
    read_rows = tl.minimum(rows, rows_count - 1).to(tl.int64)
    read_outs = tl.minimum(outs, out_count - 1).to(tl.int64)
    columns = tl.arange(0, STEP).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * (PARTS * STEPS * STEP)
    hidden += head * hidden_head + read_rows[:, None] * hidden_row + columns[None, :] * hidden_column
    weight += head * weight_head + read_outs[:, None] * weight_row + columns[None, :] * weight_column
    nothing = tl.full((OUTS, ROWS), 0.0, tl.float32)
    total = nothing
    for index in range(PARTS):
        part = nothing
        for step in tl.range(0, STEPS, num_stages=STAGES):
            begin = first + (index * STEPS + step) * STEP
            if IS_WHOLE:
                left = tl.load(weight + begin * weight_column)
                right = tl.load(hidden + begin * hidden_column)
            else:
                inside = columns[None, :] < in_count - begin
                left = tl.load(weight + begin * weight_column, mask=inside, other=0.0)
                right = tl.load(hidden + begin * hidden_column, mask=inside, other=0.0)
            part = dot(left, tl.trans(right), part)
        total += part
    if bias is not None:
        total += tl.load(bias + read_outs).to(tl.float32)[:, None]
    total = tl.trans(to_dtype(total, out.dtype.element_ty))
    places = tl.program_id(1).to(tl.int64) * rows_count + rows
    out += (places * tl.num_programs(2) + head)[:, None] * out_count + outs[None, :]
    tl.store(out, total, mask=(rows < rows_count)[:, None] & (outs < out_count)[None, :])


@triton.jit(do_not_specialize=["rows_count"])
def _sum_parts(partial, bias, out, rows_count, out_count, PARTS: tl.constexpr, NUMBERS: tl.constexpr):
    numbers_count = rows_count * out_count  # of all parts: PARTIAL_NUMBERS_MAX at most
    places = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside = places < numbers_count
    total = tl.full((NUMBERS,), 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * numbers_count + places, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + places % out_count).to(tl.float32)
    tl.store(out + places, to_dtype(total, out.dtype.element_ty), mask=inside)
