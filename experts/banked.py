"""All experts in this process on one device, those of a layer as one bank, for a model that fits a card."""

import torch

from experts.local import Computed
from experts.weights import every_expert, load_experts
from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.model.config import ModelConfig
from kernels.ops.expert_bank import ExpertBank, experts_contiguous
from kernels.ops.expert_mlp import bank_of
from kernels.ops.group_by_expert import group_by_expert
from kernels.ops.mix import mix_placed


class BankedExperts:
    """RoutedExperts without a wire and without a look at the host: a dispatch is a few launches."""

    is_recordable = True

    def __init__(self, config: ModelConfig, banks: dict[int, ExpertBank]):
        """`banks` are those of the MoE layers."""
        self._experts_count = config.routed_experts_count
        self._banks = banks

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        on_progress: ProgressCallback | None,
        device: torch.device | str,
    ) -> "BankedExperts":
        """Load every expert of a checkpoint, FP8 weights as they are; raises CheckpointError."""
        config = checkpoint.config
        weights = load_experts(checkpoint, every_expert(checkpoint), dtype, on_progress, device, True)
        every = range(config.routed_experts_count)
        banks = {layer: bank_of([weights[layer, expert] for expert in every]) for layer in config.moe_layers}
        return cls(config, banks)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Computed:
        """Compute the experts of `hidden [tokens, hidden]` at once."""
        order, offsets, places = group_by_expert(expert_ids, self._experts_count)
        rows = order // expert_ids.shape[1]
        outputs = experts_contiguous(hidden, rows, offsets, self._banks[layer])
        return Computed(mix_placed(outputs, expert_weights, places))
