"""The weights of the experts that a process holds, read from the checkpoint one layer at a time."""

from collections.abc import Iterable

import torch

from kernels.model.checkpoint import Checkpoint, ProgressCallback, expert_names
from kernels.ops.expert_mlp import GatedWeights

ExpertWeights = dict[tuple[int, int], GatedWeights]


def load_experts(
    checkpoint: Checkpoint,
    experts: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    on_progress: ProgressCallback | None = None,
) -> ExpertWeights:
    """Weights of (layer, expert) pairs in `dtype`; raises CheckpointError. Progress is in layers."""
    by_layer: dict[int, list[int]] = {}
    for layer, expert in experts:
        by_layer.setdefault(layer, []).append(expert)
    held: ExpertWeights = {}
    for done, (layer, wanted) in enumerate(by_layer.items(), 1):
        held |= _load_layer(checkpoint, layer, wanted, dtype)
        if on_progress is not None:
            on_progress(done, len(by_layer))
    return held


def _load_layer(checkpoint: Checkpoint, layer: int, experts: list[int], dtype: torch.dtype) -> ExpertWeights:
    names = {expert: expert_names(checkpoint.config, layer, expert) for expert in experts}
    weights = checkpoint.load([name for three in names.values() for name in three], dtype)
    return {
        (layer, expert): GatedWeights.packed(weights[gate], weights[up], weights[down], dtype)
        for expert, (gate, up, down) in names.items()
    }


def every_expert(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """All (layer, expert) pairs of a model."""
    config = checkpoint.config
    return [(layer, expert) for layer in config.moe_layers for expert in range(config.routed_experts_count)]
