"""The SwiGLU of many experts over tokens sorted by expert: `down(silu(gate(x)) * up(x))`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch.nn import functional

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import add_product, add_two_products, compiled, exp_each, runs_compiled
from kernels.ops.expert_bank import ExpertBank, experts_contiguous_reference
from kernels.ops.expert_bank_kernel import (
    EXPERTS_WIDTH_MIN,
    FEW,
    SOME,
    WeightTable,
    addresses_of,
    experts_contiguous_kernel,
)
from kernels.ops.linear import rows_missing
from kernels.ops.linear_fp8 import Fp8Weight
from kernels.ops.projection import Weight, is_fp8, joined, prepared, project

SMALL_NUMBERS_MAX = 1 << 16  # a quarter of a MiB, which stays in a core's own cache
SERIAL_NUMBERS_MAX = (1 << 15) - 1  # torch shares out what is larger among threads


@dataclass(frozen=True, slots=True)
class GatedWeights:
    """One gated MLP: `gate_up [2 * intermediate, hidden]`, gate first, and `down [hidden, intermediate]`."""

    gate_up: Weight
    down: Weight

    @classmethod
    def packed(cls, gate: Weight, up: Weight, down: Weight, dtype: torch.dtype) -> "GatedWeights":
        """From the three projections of a checkpoint, `[out, in]` each, as they multiply fastest.

        What cannot stay FP8 becomes `dtype`.
        """
        return cls.of(joined([gate, up], dtype), down)

    @classmethod
    def of(cls, gate_up: Weight, down: Weight) -> "GatedWeights":
        """From both weights row after row in memory, as they multiply fastest."""
        if is_fp8(gate_up) or is_fp8(down):
            return cls(prepared(gate_up), prepared(down))
        if runs_kernel(down):
            return cls(gate_up, down)
        if 3 * down.numel() <= SMALL_NUMBERS_MAX and runs_compiled(down):
            return cls(column_by_column(gate_up), column_by_column(down))
        return cls(prepared(gate_up), prepared(down))

    def plain(self) -> tuple[torch.Tensor, ...]:
        """Both weights row after row in memory, with the bits of the checkpoint, then their scales if any."""
        if is_fp8(self.down):
            return self.gate_up.weight, self.down.weight, self.gate_up.scales, self.down.scales
        both = (self.gate_up, self.down)
        return tuple(part.to_dense() if part.is_mkldnn else part.contiguous() for part in both)

    @classmethod
    def of_plain(cls, parts: Sequence[torch.Tensor]) -> "GatedWeights":
        """From what `plain` gives, on the device that is to multiply by it."""
        gate_up, down, *scales = parts
        if not scales:
            return cls.of(gate_up, down)
        return cls(Fp8Weight(gate_up, scales[0]), Fp8Weight(down, scales[1]))

    @property
    def are_in_rows(self) -> bool:
        """Whether they are kept as kernels read them."""
        return is_fp8(self.down) or not (self.down.is_mkldnn or self.are_small)

    @property
    def are_small(self) -> bool:
        """Whether they are kept for compiled loops: calls of torch would cost more than the products."""
        return not is_fp8(self.down) and not self.down.is_mkldnn and self.down.stride(0) == 1


def column_by_column(weight: torch.Tensor) -> torch.Tensor:
    """The same `weight [out, in]`, with a column's numbers side by side in memory."""
    return weight.t().contiguous().t()


def gated_mlp(hidden: torch.Tensor, weights: GatedWeights) -> torch.Tensor:
    """`hidden [rows, hidden]` through one gated MLP."""
    if weights.are_small and not runs_kernel(hidden):
        return _gated_slots(hidden, torch.arange(len(hidden)), [weights], [len(hidden)])
    gate, up = project(hidden, weights.gate_up).chunk(2, dim=-1)
    return project(silu_by_row(gate) * up, weights.down)


def silu_by_row(gate: torch.Tensor) -> torch.Tensor:
    """`gate * sigmoid(gate)` of `gate [rows, intermediate]`, half of wider rows: same bits in any batch.

    On CPU the last numbers of a run take another path than the rest. Runs are whole rows, which lie apart in
    the wider tensor, unless threads share them out: so each call is kept too small for that.
    """
    rows_max = max(SERIAL_NUMBERS_MAX // gate.shape[1], 1)
    if gate.device.type != "cpu" or gate.shape[0] <= rows_max or torch.get_num_threads() == 1:
        return functional.silu(gate)
    return torch.cat([functional.silu(some) for some in gate.split(rows_max)])


def expert_mlp(
    hidden: torch.Tensor, rows: torch.Tensor, experts: Sequence[GatedWeights], counts: Sequence[int]
) -> torch.Tensor:
    """Outputs `[slots, hidden]`, sorted by expert: slot i is row `rows[i]` of `hidden [tokens, hidden]`.

    The first `counts[0]` slots go through `experts[0]`, the next `counts[1]` through `experts[1]`, and so on.
    """
    if runs_kernel(hidden) and experts[0].are_in_rows:
        offsets, table = told(hidden.device, experts, counts)
        return experts_contiguous_kernel(hidden, rows.to(torch.int32), offsets, table)
    if is_fp8(experts[0].down):
        offsets = torch.tensor([0, *accumulate(counts)])
        return experts_contiguous_reference(hidden, rows, offsets, bank_of(experts))
    if experts[0].are_small:
        return _gated_slots(hidden, rows, experts, counts)
    sizes = [
        count + rows_missing(count, weights.gate_up) for count, weights in zip(counts, experts, strict=True)
    ]
    padded = sizes != list(counts)
    slots = hidden[with_repeats(rows, counts, sizes) if padded else rows]
    out = torch.cat(
        [gated_mlp(some, weights) for some, weights in zip(slots.split(sizes), experts, strict=True)]
    )
    return without_repeats(out, counts, sizes) if padded else out


def compile_expert_mlp(experts: Sequence[GatedWeights], hidden: torch.Tensor) -> None:
    """Have the kernels of `expert_mlp` compiled for calls with some or all of `experts`, and any counts.

    `hidden [1, hidden]` is of the type that tokens will have.
    """
    widths = [EXPERTS_WIDTH_MIN << doubled for doubled in range(len(experts).bit_length())]
    for experts_count in (*(width for width in widths if width < len(experts)), len(experts)):
        for slots_count in (FEW, SOME, SOME + 1):
            counts = [slots_count] * experts_count
            rows = torch.zeros(sum(counts), dtype=torch.int32, device=hidden.device)
            expert_mlp(hidden, rows, experts[:experts_count], counts)


def bank_of(experts: Sequence[GatedWeights]) -> ExpertBank:
    """Experts of one format as a bank, in the memory where they are if they are kept in rows."""
    return ExpertBank(*zip(*(weights.plain() for weights in experts), strict=True))


def told(
    device: torch.device, experts: Sequence[GatedWeights], counts: Sequence[int]
) -> tuple[torch.Tensor, WeightTable]:
    """Where each expert's slots begin, `[experts + 1]` int32, and where its weights are, in one copy.

    Nobody waits for that: experts must be kept until what reads the table is over. Raises ValueError for
    experts of different formats.
    """
    each = [weights.plain() for weights in experts]
    formats = {tuple((part.shape, part.dtype) for part in parts) for parts in each}
    if len(formats) > 1 or not all(weights.are_in_rows for weights in experts):
        raise ValueError("experts of one call differ in format or size: load all of a model in the same way")
    addresses = [address for parts in each for address in addresses_of(parts)]
    offsets = [0, *accumulate(counts)]
    numbers_count = len(addresses) + (len(offsets) + 1) // 2  # two offsets in the room of an address
    numbers = torch.empty(numbers_count, dtype=torch.int64, pin_memory=device.type == "cuda")
    numbers.numpy()[: len(addresses)] = addresses
    numbers.numpy()[len(addresses) :].view(np.int32)[: len(offsets)] = offsets
    there = numbers.to(device, non_blocking=True)
    (_, hidden_size), (_, intermediate_size) = each[0][0].shape, each[0][1].shape
    table = there[: len(addresses)].view(len(experts), -1)
    return (
        there[len(addresses) :].view(torch.int32)[: len(offsets)],
        WeightTable(table, hidden_size, intermediate_size, each[0][1].dtype),
    )


def with_repeats(rows: torch.Tensor, counts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """`rows [slots]` in groups of `counts`, each filled up to its size with its first row."""
    flat, wide, begin = rows.tolist(), [], 0
    for count, size in zip(counts, sizes, strict=True):
        wide += flat[begin : begin + count]
        wide += flat[begin : begin + 1] * (size - count)
        begin += count
    return torch.tensor(wide, device=rows.device)


def without_repeats(out: torch.Tensor, counts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """The first `counts` rows of each group of `sizes` rows of `out`."""
    kept, begin = [], 0
    for count, size in zip(counts, sizes, strict=True):
        kept += range(begin, begin + count)
        begin += size
    return out[torch.tensor(kept, device=out.device)]


def _gated_slots(
    hidden: torch.Tensor, rows: torch.Tensor, experts: Sequence[GatedWeights], counts: Sequence[int]
) -> torch.Tensor:
    """What `expert_mlp` computes, for weights that are small."""
    out = hidden.new_empty(len(rows), hidden.shape[1])
    tokens, slots, places = hidden.contiguous().numpy(), out.numpy(), rows.to(torch.int64).numpy()
    wide = np.empty((2, 3 * experts[0].down.shape[1]), np.float32)
    if hidden.shape[1] != experts[0].gate_up.shape[1] or sum(counts) != len(rows):
        raise ValueError(f"experts or {len(rows)} slots do not fit {list(hidden.shape)}")
    if len(rows) and not 0 <= places.min() <= places.max() < len(tokens):
        raise ValueError("a slot names a token that is not there")
    begin = 0
    for weights, count in zip(experts, counts, strict=True):
        end = begin + count
        # rows of a transposed weight follow each other in memory
        gate_up, down = weights.gate_up.t().numpy(), weights.down.t().numpy()
        _gate_rows(tokens, places[begin:end], gate_up, down, wide, slots[begin:end])
        begin = end
    return out


@compiled()
def _gate(wide):
    """Make the first third of a row that begins with gate and up `silu(gate) * up`."""
    size = len(wide) // 3
    gate, up, powers = wide[:size], wide[size : 2 * size], wide[2 * size :]
    for column in range(size):
        powers[column] = -gate[column]
    exp_each(powers)
    for column in range(size):
        gate[column] = gate[column] / (np.float32(1) + powers[column]) * up[column]


@compiled(
    "void(float32[:, ::1], int64[::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1])"
)
def _gate_rows(hidden, rows, gate_up, down, wide, out):
    out[:] = 0
    size = len(down)
    first, second = wide[0], wide[1]
    for slot in range(0, len(rows) - 1, 2):
        wide[:] = 0
        row, other = hidden[rows[slot]], hidden[rows[slot + 1]]
        add_two_products(row, other, gate_up, first[: 2 * size], second[: 2 * size])
        _gate(first)
        _gate(second)
        add_two_products(first[:size], second[:size], down, out[slot], out[slot + 1])
    if len(rows) % 2:
        wide[:] = 0
        add_product(hidden[rows[-1]], gate_up, first[: 2 * size])
        _gate(first)
        add_product(first[:size], down, out[-1])
