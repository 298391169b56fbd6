"""The experts of one layer side by side in memory, and their SwiGLU on a GPU: `down(silu(gate(x)) * up(x))`.

Which tokens go where is data on the device, so that a step never waits for it: either slots sorted by expert
or a buffer of fixed size for each expert. FP8 weights multiply FP8 numbers: tokens, and what lies between the
two products, are rounded to it, each 128 numbers of a row with a scale of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from kernels.ops.backend import runs_kernel
from kernels.ops.expert_bank_kernel import experts_contiguous_kernel, experts_masked_kernel
from kernels.ops.quantize import (
    ROW_BLOCK,
    dequantize_blocks,
    quantize_blocks,
    quantize_rows_reference,
    scale_shape,
)

BLOCK = (128, 128)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """`gate_up [experts, 2 * intermediate, hidden]`, gate first, and `down [experts, hidden, intermediate]`.

    FP8 weights have a float32 scale for each block of 128 x 128, gate's blocks before those of up:
    `gate_up_scales [experts, 2 * ceil(intermediate / 128), ceil(hidden / 128)]` and
    `down_scales [experts, ceil(hidden / 128), ceil(intermediate / 128)]`. Raises ValueError for other shapes.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None

    def __post_init__(self):
        experts_count, hidden, intermediate = self.down.shape
        _check("gate_up", self.gate_up, self.down.dtype, (experts_count, 2 * intermediate, hidden))
        _check("down", self.down, self.down.dtype, (experts_count, hidden, intermediate))
        if self.is_quantised:
            rows, columns = scale_shape(intermediate, hidden, BLOCK)
            _check("gate_up_scales", self.gate_up_scales, torch.float32, (experts_count, 2 * rows, columns))
            _check("down_scales", self.down_scales, torch.float32, (experts_count, columns, rows))
        elif self.gate_up_scales is not None or self.down_scales is not None:
            raise ValueError(f"weights are {self.down.dtype} and have scales: leave those out, or give FP8")

    @classmethod
    def stacked(
        cls,
        gate_ups: Sequence[torch.Tensor],
        downs: Sequence[torch.Tensor],
        gate_up_scales: Sequence[torch.Tensor] | None = None,
        down_scales: Sequence[torch.Tensor] | None = None,
    ) -> "ExpertBank":
        """From plain weights of each expert, `[2 * intermediate, hidden]` and `[hidden, intermediate]`."""
        parts = (gate_ups, downs, gate_up_scales, down_scales)
        return cls(*(None if part is None else torch.stack(list(part)) for part in parts))

    @property
    def is_quantised(self) -> bool:
        """Whether weights are FP8 with scales."""
        return self.down.dtype == FP8

    def quantised(self) -> "ExpertBank":
        """The same experts in FP8."""
        gates, ups = ([quantize_blocks(one, BLOCK) for one in half] for half in self.gate_up.chunk(2, dim=1))
        downs = [quantize_blocks(one, BLOCK) for one in self.down]
        pairs = [
            [torch.cat(both) for both in zip(*halves, strict=True)] for halves in zip(gates, ups, strict=True)
        ]
        (gate_ups, gate_up_scales), (downs, down_scales) = zip(*pairs, strict=True), zip(*downs, strict=True)
        return ExpertBank.stacked(gate_ups, downs, gate_up_scales, down_scales)

    def expert(self, index: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up and down of one expert in `dtype`, multiplied by their scales."""
        weights = (*self.gate_up[index].chunk(2), self.down[index])
        if not self.is_quantised:
            return tuple(weight.to(dtype) for weight in weights)
        scales = (*self.gate_up_scales[index].chunk(2), self.down_scales[index])
        return tuple(dequantize_blocks(*pair, BLOCK, dtype) for pair in zip(weights, scales, strict=True))


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
    if hidden.dim() != 2 or hidden.shape[1] != bank.down.shape[1] or hidden.stride(1) != 1:
        raise ValueError(f"hidden is {list(hidden.shape)}: give [tokens, {bank.down.shape[1]}], row by row")
    _check_index("rows", rows, rows.numel())
    _check_index("offsets", offsets, len(bank.down) + 1)
    if runs_kernel(hidden):
        return experts_contiguous_kernel(hidden, rows, offsets, bank)
    return experts_contiguous_reference(hidden, rows, offsets, bank)


def experts_masked_reference(hidden: torch.Tensor, counts: torch.Tensor, bank: ExpertBank) -> torch.Tensor:
    """What `experts_masked` computes, in torch."""
    out = torch.empty_like(hidden)
    for index, count in enumerate(counts.tolist()):
        out[index, :count] = _swiglu(hidden[index, :count], bank, index)
    return out


def experts_masked(hidden: torch.Tensor, counts: torch.Tensor, bank: ExpertBank) -> torch.Tensor:
    """Outputs as `hidden [experts, capacity, hidden]`: buffers whose first `counts[e]` rows are there.

    `counts [experts]` is int32 and at most the capacity. Other rows are neither read nor written.
    """
    experts_count, size = bank.down.shape[:2]
    if hidden.dim() != 3 or hidden.shape[::2] != (experts_count, size) or not hidden.is_contiguous():
        raise ValueError(
            f"hidden is {list(hidden.shape)}: give [{experts_count}, capacity, {size}], contiguous"
        )
    _check_index("counts", counts, experts_count)
    if runs_kernel(hidden):
        return experts_masked_kernel(hidden, counts, bank)
    return experts_masked_reference(hidden, counts, bank)


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


def _check(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        there = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} is {there}: give {dtype} {list(shape)}, contiguous")


def _check_index(name: str, tensor: torch.Tensor, count: int) -> None:
    if tensor.dtype != torch.int32 or tensor.shape != (count,):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: give torch.int32 [{count}]")
