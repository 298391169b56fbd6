"""The experts of one layer, wherever they are in memory, and their SwiGLU: `down(silu(gate(x)) * up(x))`.

Which tokens go where is data on the device, so that a step never waits for it: either slots sorted by expert
or a buffer of fixed size for each expert. FP8 weights multiply FP8 numbers: tokens, and what lies between the
two products, are rounded to it, each 128 numbers of a row with a scale of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.nn import functional

from kernels.ops.backend import runs_kernel
from kernels.ops.expert_bank_kernel import (
    WeightTable,
    addresses_of,
    experts_contiguous_kernel,
    experts_masked_kernel,
)
from kernels.ops.fp8_sizes import WEIGHT_BLOCK, scale_shape
from kernels.ops.quantize import ROW_BLOCK, dequantize_blocks, quantize_blocks, quantize_rows_reference

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """Each expert's `gate_up [2 * intermediate, hidden]`, gate first, and `down [hidden, intermediate]`.

    FP8 weights have a float32 scale for each block of 128 x 128, gate's blocks before those of up:
    `gate_up_scales [2 * ceil(intermediate / 128), ceil(hidden / 128)]` and
    `down_scales [ceil(hidden / 128), ceil(intermediate / 128)]`. Experts may be tensors of their own or the
    parts of one. Raises ValueError for other shapes.
    """

    gate_up: Sequence[torch.Tensor]
    down: Sequence[torch.Tensor]
    gate_up_scales: Sequence[torch.Tensor] | None = None
    down_scales: Sequence[torch.Tensor] | None = None
    table: WeightTable = field(init=False)
    """The same for kernels."""

    def __post_init__(self):
        dtype, (hidden, intermediate) = self.down[0].dtype, self.down[0].shape
        rows, columns = scale_shape(intermediate, hidden, WEIGHT_BLOCK)
        self._check("gate_up", dtype, (2 * intermediate, hidden))
        self._check("down", dtype, (hidden, intermediate))
        if dtype == FP8:
            self._check("gate_up_scales", torch.float32, (2 * rows, columns))
            self._check("down_scales", torch.float32, (columns, rows))
        elif self.gate_up_scales is not None or self.down_scales is not None:
            raise ValueError(f"weights are {dtype} and have scales: leave those out, or give FP8")
        addresses = torch.tensor([addresses_of(parts) for parts in self.experts()])
        table = WeightTable(addresses.to(self.down[0].device), hidden, intermediate, dtype)
        object.__setattr__(self, "table", table)

    @property
    def is_quantised(self) -> bool:
        """Whether weights are FP8 with scales."""
        return self.table.is_quantised

    def experts(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The tensors of each expert: two, or four with scales."""
        parts = (self.gate_up, self.down, self.gate_up_scales, self.down_scales)
        return zip(*(part for part in parts if part is not None), strict=True)

    def quantised(self) -> "ExpertBank":
        """The same experts in FP8."""
        downs = [quantize_blocks(down, WEIGHT_BLOCK) for down in self.down]
        gate_ups = []
        for gate_up in self.gate_up:
            gate, up = (quantize_blocks(half, WEIGHT_BLOCK) for half in gate_up.chunk(2))
            gate_ups.append([torch.cat(both) for both in zip(gate, up, strict=True)])
        (gate_ups, gate_up_scales), (downs, down_scales) = (
            zip(*gate_ups, strict=True),
            zip(*downs, strict=True),
        )
        return ExpertBank(gate_ups, downs, gate_up_scales, down_scales)

    def expert(self, index: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up and down of one expert in `dtype`, multiplied by their scales."""
        weights = (*self.gate_up[index].chunk(2), self.down[index])
        if not self.is_quantised:
            return tuple(weight.to(dtype) for weight in weights)
        scales = (*self.gate_up_scales[index].chunk(2), self.down_scales[index])
        return tuple(
            dequantize_blocks(*pair, WEIGHT_BLOCK, dtype) for pair in zip(weights, scales, strict=True)
        )

    def _check(self, name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        parts = getattr(self, name)
        if parts is None or len(parts) != len(self.down):
            there = "missing" if parts is None else f"there for {len(parts)} experts"
            raise ValueError(f"{name} is {there}: give it for all {len(self.down)} experts")
        for part in parts:
            if part.dtype != dtype or part.shape != shape or not part.is_contiguous():
                there = f"{part.dtype} {list(part.shape)}"
                raise ValueError(f"{name} is {there}: give {dtype} {list(shape)}, contiguous")
            if part.device != self.down[0].device:
                raise ValueError(f"{name} is on {part.device}: give all of it on {self.down[0].device}")


def experts_contiguous_reference(
    hidden: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, bank: ExpertBank
) -> torch.Tensor:
    """What `experts_contiguous` computes, in torch."""
    out = hidden.new_empty(len(rows), hidden.shape[1])
    for index, (begin, end) in enumerate(pairwise(offsets.tolist())):
        out[begin:end] = _swiglu(hidden[rows[begin:end].long()], bank, index)
    return out


def experts_contiguous(
    hidden: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, bank: ExpertBank
) -> torch.Tensor:
    """Outputs `[slots, hidden]`, sorted by expert: slot i is row `rows[i]` of `hidden [tokens, hidden]`.

    Expert e has the slots from `offsets[e]` to `offsets[e + 1]`, of `offsets [experts + 1]`; both are int32.
    Slots beyond the last offset are padding: they are not read, and mean nothing in the output.
    """
    size = bank.table.hidden_size
    if hidden.dim() != 2 or hidden.shape[1] != size or hidden.stride(1) != 1:
        raise ValueError(f"hidden is {list(hidden.shape)}: give [tokens, {size}], row by row")
    _check_index("rows", rows, rows.numel())
    _check_index("offsets", offsets, bank.table.experts_count + 1)
    if runs_kernel(hidden):
        return experts_contiguous_kernel(hidden, rows, offsets, bank.table)
    return experts_contiguous_reference(hidden, rows, offsets, bank)


def experts_masked_reference(
    hidden: torch.Tensor, counts: torch.Tensor, bank: ExpertBank, slots_max: int
) -> torch.Tensor:
    """What `experts_masked` computes, in torch; raises ValueError for counts beyond `slots_max`."""
    if counts.sum() > slots_max:
        raise ValueError(f"counts are {int(counts.sum())} slots: give slots_max of as many, not {slots_max}")
    out = torch.empty_like(hidden)
    for index, count in enumerate(counts.tolist()):
        out[index, :count] = _swiglu(hidden[index, :count], bank, index)
    return out


def experts_masked(
    hidden: torch.Tensor, counts: torch.Tensor, bank: ExpertBank, slots_max: int
) -> torch.Tensor:
    """Outputs as `hidden [experts, capacity, hidden]`: buffers whose first `counts[e]` rows are there.

    `counts [experts]` is int32, each at most the capacity, together at most `slots_max`: tokens times their
    choices, for a GPU must not wait to be told. Other rows are neither read nor written.
    """
    experts_count, size = bank.table.experts_count, bank.table.hidden_size
    if hidden.dim() != 3 or hidden.shape[::2] != (experts_count, size) or not hidden.is_contiguous():
        raise ValueError(
            f"hidden is {list(hidden.shape)}: give [{experts_count}, capacity, {size}], contiguous"
        )
    _check_index("counts", counts, experts_count)
    if runs_kernel(hidden):
        return experts_masked_kernel(hidden, counts, bank.table, slots_max)
    return experts_masked_reference(hidden, counts, bank, slots_max)


def _swiglu(hidden: torch.Tensor, bank: ExpertBank, index: int) -> torch.Tensor:
    """Rows through one expert, summed in float32, or in float64 where hidden is."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    gate, up, down = bank.expert(index, dtype)
    inputs = _rounded_to_fp8(hidden) if bank.is_quantised else hidden.to(dtype)
    inner = functional.silu(inputs @ gate.T) * (inputs @ up.T)
    inner = _rounded_to_fp8(inner) if bank.is_quantised else inner.to(hidden.dtype).to(dtype)
    return (inner @ down.T).to(hidden.dtype)


def _rounded_to_fp8(rows: torch.Tensor) -> torch.Tensor:
    """What is left of rows in FP8, in float32, or in float64 where they are."""
    return dequantize_blocks(
        *quantize_rows_reference(rows), ROW_BLOCK, torch.promote_types(rows.dtype, torch.float32)
    )


def _check_index(name: str, tensor: torch.Tensor, count: int) -> None:
    if tensor.dtype != torch.int32 or tensor.shape != (count,):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: give torch.int32 [{count}]")
