"""The weights of the experts that a process holds, read from the checkpoint one layer at a time."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.model.config import ModelConfig
from kernels.model.safetensors_header import CheckpointError
from kernels.model.tensor_names import expert_names
from kernels.ops.expert_mlp import GatedWeights
from kernels.ops.linear_fp8 import WEIGHT_BLOCK
from kernels.ops.projection import is_fp8, moved
from kernels.ops.quantize import scale_shape

ExpertWeights = dict[tuple[int, int], GatedWeights]
Part = tuple[tuple[int, int], torch.dtype]


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """What every routed expert of a model is in memory: FP8 with scales, or numbers of `dtype`."""

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    is_fp8: bool

    @classmethod
    def of(cls, model: ModelConfig, dtype: torch.dtype, keeps_fp8: bool) -> "ExpertFormat":
        """FP8 where it is kept, comes in blocks of 128 x 128, and no block is half of gate and half of up."""
        intermediate_size = model.moe_intermediate_size
        fits = model.weight_format.block == WEIGHT_BLOCK and intermediate_size % WEIGHT_BLOCK[0] == 0
        return cls(model.hidden_size, intermediate_size, dtype, keeps_fp8 and fits)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Shape and type of each tensor, in the order of `GatedWeights.plain`."""
        shapes = (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        if not self.is_fp8:
            return tuple((shape, self.dtype) for shape in shapes)
        scales = tuple((scale_shape(*shape, WEIGHT_BLOCK), torch.float32) for shape in shapes)
        return tuple((shape, torch.float8_e4m3fn) for shape in shapes) + scales

    @property
    def bytes_count(self) -> int:
        """Memory of one expert of one layer."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts)


def load_experts(
    checkpoint: Checkpoint,
    experts: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    on_progress: ProgressCallback | None = None,
    device: torch.device | str = "cpu",
    keeps_fp8: bool = False,
) -> ExpertWeights:
    """Weights of (layer, expert) pairs on a device, all of one format; raises CheckpointError.

    They are in `dtype`, or stay FP8 if that is kept and possible. Progress is in layers.
    """
    expert_format = ExpertFormat.of(checkpoint.config, dtype, keeps_fp8)
    by_layer: dict[int, list[int]] = {}
    for layer, expert in experts:
        by_layer.setdefault(layer, []).append(expert)
    held: ExpertWeights = {}
    for done, (layer, wanted) in enumerate(by_layer.items(), 1):
        held |= _load_layer(checkpoint, layer, wanted, expert_format, device)
        if on_progress is not None:
            on_progress(done, len(by_layer))
    return held


def _load_layer(
    checkpoint: Checkpoint,
    layer: int,
    experts: list[int],
    expert_format: ExpertFormat,
    device: torch.device | str,
) -> ExpertWeights:
    names = {expert: expert_names(checkpoint.config, layer, expert) for expert in experts}
    every = [name for three in names.values() for name in three]
    dtype, keeps_fp8 = expert_format.dtype, expert_format.is_fp8
    weights = checkpoint.load(every, dtype, keeps_fp8=keeps_fp8)
    if keeps_fp8 and (plain := [name for name in every if not is_fp8(weights[name])]):
        remedy = "quantise all experts, or compute on CPUs, which take either"
        raise CheckpointError(f"{plain[0]}: is not FP8, unlike what config.json says of weights: {remedy}")
    return {
        (layer, expert): GatedWeights.packed(*(moved(weights.pop(name), device) for name in three), dtype)
        for expert, three in names.items()
    }


def every_expert(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """All (layer, expert) pairs of a model."""
    config = checkpoint.config
    return [(layer, expert) for layer in config.moe_layers for expert in range(config.routed_experts_count)]
