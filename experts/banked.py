"""All experts in this process on one device, those of a layer side by side, for a model that fits a card."""

import torch

from experts.local import Computed
from kernels.model.checkpoint import Checkpoint, ProgressCallback, expert_names
from kernels.model.config import ModelConfig
from kernels.ops.expert_bank import BLOCK, ExpertBank, experts_contiguous
from kernels.ops.group_by_expert import group_by_expert
from kernels.ops.mix import mix_placed
from kernels.ops.quantize import scale_shape


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
        layers = checkpoint.config.moe_layers
        banks = {}
        for done, layer in enumerate(layers, 1):
            banks[layer] = load_bank(checkpoint, layer, dtype, device)
            if on_progress is not None:
                on_progress(done, len(layers))
        return cls(checkpoint.config, banks)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Computed:
        """Compute the experts of `hidden [tokens, hidden]` at once."""
        order, offsets, places = group_by_expert(expert_ids, self._experts_count)
        rows = order // expert_ids.shape[1]
        outputs = experts_contiguous(hidden, rows, offsets, self._banks[layer])
        return Computed(mix_placed(outputs, expert_weights, places))


def load_bank(
    checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: torch.device | str
) -> ExpertBank:
    """One layer's experts on a device: in `dtype`, or as FP8 where the checkpoint has 128 x 128 blocks."""
    config = checkpoint.config
    names = [expert_names(config, layer, expert) for expert in range(config.routed_experts_count)]
    is_fp8 = config.weight_format.block == BLOCK
    bank = _empty_bank(config, torch.float8_e4m3fn if is_fp8 else dtype, device)
    for expert, (gate, up, down) in enumerate(names):
        weights = checkpoint.load([gate, up, down], dtype, keeps_fp8=is_fp8)
        halves = [weights[gate], weights[up]]
        if is_fp8:
            bank.gate_up_scales[expert].copy_(torch.cat([half.scales for half in halves]))
            bank.down_scales[expert].copy_(weights[down].scales)
            halves, weights[down] = [half.weight for half in halves], weights[down].weight
        bank.gate_up[expert].copy_(torch.cat(halves))
        bank.down[expert].copy_(weights[down])
    return bank


def _empty_bank(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> ExpertBank:
    experts_count, hidden = config.routed_experts_count, config.hidden_size
    intermediate = config.moe_intermediate_size
    gate_up = torch.empty(experts_count, 2 * intermediate, hidden, dtype=dtype, device=device)
    down = torch.empty(experts_count, hidden, intermediate, dtype=dtype, device=device)
    if dtype != torch.float8_e4m3fn:
        return ExpertBank(gate_up, down)
    rows, columns = scale_shape(intermediate, hidden, BLOCK)
    gate_up_scales = torch.empty(experts_count, 2 * rows, columns, device=device)
    return ExpertBank(gate_up, down, gate_up_scales, gate_up_scales.new_empty(experts_count, columns, rows))
