"""The weights of the experts that a process holds, read from the checkpoint one layer at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from experts.expert_size import come_in_fp8, expert_shapes, scale_shapes
from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.model.config import ModelConfig
from kernels.model.safetensors_header import CheckpointError
from kernels.model.tensor_names import expert_names
from kernels.ops.expert_mlp import GatedWeights
from kernels.ops.projection import is_fp8, moved

ExpertWeights = dict[tuple[int, int], GatedWeights]
Part = tuple[tuple[int, int], torch.dtype]


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """What every routed expert of a model is in memory: FP8 with scales, or numbers of `dtype`."""

    dtype: torch.dtype
    is_fp8: bool
    parts: tuple[Part, ...]
    """Shape and type of each tensor, in the order of `GatedWeights.plain`."""

    @classmethod
    def of(cls, model: ModelConfig, dtype: torch.dtype, keeps_fp8: bool) -> "ExpertFormat":
        """FP8 where that is kept and experts come in it."""
        is_fp8 = keeps_fp8 and come_in_fp8(model)
        parts = tuple((shape, torch.float8_e4m3fn if is_fp8 else dtype) for shape in expert_shapes(model))
        if is_fp8:
            parts += tuple((shape, torch.float32) for shape in scale_shapes(model))
        return cls(dtype, is_fp8, parts)


def load_experts(
    checkpoint: Checkpoint,
    experts: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    on_progress: ProgressCallback | None = None,
    device: torch.device | str = "cpu",
    keeps_fp8: bool = False,
) -> ExpertWeights:
    """Weights of (layer, expert) pairs on a device, all of one format; raises CheckpointError.

    They are in `dtype`, or stay FP8 if that is kept and possible. Progress is in experts.
    """
    expert_format = ExpertFormat.of(checkpoint.config, dtype, keeps_fp8)
    by_layer: dict[int, list[int]] = {}
    for layer, expert in experts:
        by_layer.setdefault(layer, []).append(expert)
    held: ExpertWeights = {}
    total_count = sum(map(len, by_layer.values()))
    for layer, wanted in by_layer.items():
        held |= _load_layer(checkpoint, layer, wanted, expert_format, device)
        if on_progress is not None:
            on_progress(len(held), total_count)
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
