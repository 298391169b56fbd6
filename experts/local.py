"""All experts in this process: the reference, and the way of small deployments."""

from dataclasses import dataclass

import torch

from experts.weights import ExpertWeights, every_expert, load_experts
from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.ops.expert_mlp import expert_mlp
from kernels.ops.mix import mix
from kernels.ops.sort_by_expert import sort_by_expert


@dataclass(frozen=True, slots=True)
class Computed:
    """Experts that have already answered."""

    mixed: torch.Tensor

    def combine(self) -> torch.Tensor:
        """The mixed outputs `[tokens, hidden]` float32."""
        return self.mixed


class LocalExperts:
    """RoutedExperts without a wire."""

    is_recordable = False

    def __init__(self, weights: ExpertWeights):
        self._weights = weights

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        on_progress: ProgressCallback | None = None,
        device: torch.device | str = "cpu",
    ) -> "LocalExperts":
        """Load every expert of a checkpoint; raises CheckpointError."""
        return cls(load_experts(checkpoint, every_expert(checkpoint), dtype, on_progress, device))

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Computed:
        """Compute the experts of `hidden [tokens, hidden]` at once."""
        order, present, counts = sort_by_expert(expert_ids)
        held = [self._weights[layer, expert] for expert in present]
        outputs = expert_mlp(hidden, order // expert_ids.shape[1], held, counts)
        return Computed(mix(outputs, expert_weights, order))
