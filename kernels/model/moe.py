"""A layer's mixture of experts, which never learns where the experts live."""

from typing import Protocol

import torch

from kernels.model.config import ModelConfig
from kernels.model.layers import Weights, gated_weights
from kernels.ops.backend import runs_kernel
from kernels.ops.expert_mlp import gated_mlp
from kernels.ops.gate import gate_greedy, gate_noaux_tc
from kernels.ops.linear import linear, packed


class PendingExperts(Protocol):
    """Tokens on their way to experts and back."""

    def combine(self) -> torch.Tensor:
        """Wait for the experts and mix their outputs by weight, `[tokens, hidden]` float32."""


class RoutedExperts(Protocol):
    """The socket that experts plug into: in this process, or in shards of their own."""

    is_recordable: bool
    """Whether a dispatch is computed at once on the device of its tokens, without a look at their values."""

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> PendingExperts:
        """Send `hidden [tokens, hidden]` to `expert_ids [tokens, choices]`; does not wait for them."""


class NoExperts:
    """An empty socket: for weights that are loaded before it is known who serves from them."""

    is_recordable = False

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> PendingExperts:
        """Raises RuntimeError: there is nobody to send tokens to."""
        raise RuntimeError(f"layer {layer}: this model is plugged into no experts")


class MixtureOfExperts:
    """The gate and the shared experts; the routed ones are whoever's the caller plugs in."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        self.config = config
        self.layer = layer
        prefix = f"model.layers.{layer}.mlp."
        gate = weights[f"{prefix}gate.weight"]
        # A GPU's products of bfloat16 are exact in float32; a CPU's library would round their sums.
        self._gate = gate if runs_kernel(gate) else packed(gate.float())
        self._gate_bias = weights.get(f"{prefix}gate.e_score_correction_bias")
        shared = config.shared_experts_count > 0
        self._shared = gated_weights(weights, f"{prefix}shared_experts.", gate.dtype) if shared else None

    def choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert weights float32 and ids int64, `[tokens, choices]`, of `hidden [tokens, hidden]`."""
        logits = linear(hidden.to(self._gate.dtype), self._gate, dtype=torch.float32)
        gate = self.config.gate
        limits = (gate.experts_per_token, gate.groups_count, gate.groups_per_token)
        if gate.method == "noaux_tc":
            return gate_noaux_tc(logits, self._gate_bias, *limits, gate.normalised, gate.scaling)
        return gate_greedy(logits, *limits, gate.scaling)

    def dispatch(self, hidden: torch.Tensor, routed: RoutedExperts) -> PendingExperts:
        """Send each token to its experts; the shared ones can be computed meanwhile."""
        weights, ids = self.choose(hidden)
        return routed.dispatch(self.layer, hidden, ids, weights)

    def shared(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Output of the shared experts, `[tokens, hidden]`, or None where the model has none."""
        return None if self._shared is None else gated_mlp(hidden, self._shared)
