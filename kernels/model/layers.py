"""The small parts of a layer: how positions turn, and how a checkpoint's gated MLP is put together."""

import math
from collections.abc import Mapping

import torch

from kernels.model.config import ModelConfig, RopeConfig, YarnConfig
from kernels.ops.expert_mlp import GatedWeights
from kernels.ops.projection import Weight

Weights = Mapping[str, Weight]


def rope_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Radians per position of each pair of `dim` dimensions, `[dim / 2]` float32, stretched by YaRN."""
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.yarn is None:
        return 1.0 / powers
    kept = 1 - yarn_ramp(rope, rope.yarn, dim)
    return (1.0 / (rope.yarn.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def yarn_ramp(rope: RopeConfig, yarn: YarnConfig, dim: int) -> torch.Tensor:
    """0 for the pairs that YaRN leaves as they are, 1 for those it stretches in full (arXiv 2309.00071)."""

    def pair_of(turns: float) -> float:
        return (
            dim * math.log(yarn.original_positions_max / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much YaRN sharpens attention for a context `factor` times longer."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_scale(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by."""
    yarn = rope.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by before the softmax, YaRN's mscale included."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope.yarn
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def gated_weights(weights: Weights, prefix: str, dtype: torch.dtype) -> GatedWeights:
    """The gated MLP whose projections are named `prefix` + gate_proj, up_proj and down_proj."""
    gate, up = weights[f"{prefix}gate_proj.weight"], weights[f"{prefix}up_proj.weight"]
    return GatedWeights.packed(gate, up, weights[f"{prefix}down_proj.weight"], dtype)
