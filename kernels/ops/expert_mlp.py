"""The SwiGLU of many experts over tokens sorted by expert: `down(silu(gate(x)) * up(x))`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.ops.linear import linear, rows_missing

SERIAL_NUMBERS_MAX = (1 << 15) - 1  # torch shares out what is larger among threads


@dataclass(frozen=True, slots=True)
class GatedWeights:
    """One gated MLP: `gate_up [2 * intermediate, hidden]`, gate first, and `down [hidden, intermediate]`."""

    gate_up: torch.Tensor
    down: torch.Tensor


def gated_mlp(hidden: torch.Tensor, weights: GatedWeights) -> torch.Tensor:
    """`hidden [rows, hidden]` through one gated MLP."""
    gate, up = linear(hidden, weights.gate_up).chunk(2, dim=-1)
    return linear(silu_by_row(gate) * up, weights.down)


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
    sizes = [count + rows_missing(count, hidden.device) if count else 0 for count in counts]
    padded = sizes != list(counts)
    slots = hidden[with_repeats(rows, counts, sizes) if padded else rows]
    out = torch.empty_like(slots)
    begin = 0
    for weights, size in zip(experts, sizes, strict=True):
        end = begin + size
        gate, up = torch.mm(slots[begin:end], weights.gate_up.t()).chunk(2, dim=-1)
        torch.mm(silu_by_row(gate) * up, weights.down.t(), out=out[begin:end])
        begin = end
    return without_repeats(out, counts, sizes) if padded else out


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
