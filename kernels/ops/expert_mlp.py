"""The SwiGLU of many experts over tokens sorted by expert: `down(silu(gate(x)) * up(x))`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.ops.linear import linear

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
    slots = hidden[rows]
    out = torch.empty_like(slots)
    begin = 0
    for weights, count in zip(experts, counts, strict=True):
        out[begin : begin + count] = gated_mlp(slots[begin : begin + count], weights)
        begin += count
    return out
