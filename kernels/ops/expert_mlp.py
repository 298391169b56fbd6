"""The SwiGLU of many experts over tokens sorted by expert: `down(silu(gate(x)) * up(x))`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.ops.linear import linear


@dataclass(frozen=True, slots=True)
class GatedWeights:
    """One gated MLP: `gate_up [2 * intermediate, hidden]`, gate first, and `down [hidden, intermediate]`."""

    gate_up: torch.Tensor
    down: torch.Tensor


def gated_mlp(hidden: torch.Tensor, weights: GatedWeights) -> torch.Tensor:
    """`hidden [rows, hidden]` through one gated MLP."""
    gate, up = linear(hidden, weights.gate_up).chunk(2, dim=-1)
    return linear(functional.silu(gate) * up, weights.down)


def expert_mlp(
    hidden: torch.Tensor, rows: torch.Tensor, experts: Sequence[GatedWeights], counts: Sequence[int]
) -> torch.Tensor:
    """Outputs `[slots, hidden]` of slots sorted by expert: slot i is row `rows[i]` of `hidden [tokens, hidden]`.

    The first `counts[0]` slots go through `experts[0]`, the next `counts[1]` through `experts[1]`, and so on.
    """
    slots = hidden[rows]
    out = torch.empty_like(slots)
    begin = 0
    for weights, count in zip(experts, counts, strict=True):
        out[begin : begin + count] = gated_mlp(slots[begin : begin + count], weights)
        begin += count
    return out
