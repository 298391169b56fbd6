"""Experts whose wires begin at the host, for a model whose tokens are on a device."""

from dataclasses import dataclass

import torch

from kernels.model.host_copies import HostCopies
from kernels.model.moe import PendingExperts, RoutedExperts


@dataclass(frozen=True, slots=True)
class Staged:
    """Tokens on their way whose answer is wanted on a device."""

    pending: PendingExperts
    device: torch.device

    def combine(self) -> torch.Tensor:
        """Wait for the experts; the mixed outputs `[tokens, hidden]` float32 on the device."""
        return self.pending.combine().to(self.device, non_blocking=True)


class StagedExperts:
    """Brings each dispatch to the host, which alone knows where experts live, and its answer back."""

    is_recordable = False

    def __init__(self, routed: RoutedExperts):
        self._routed = routed
        self._copies = HostCopies()

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Staged:
        """Send `hidden [tokens, hidden]` once it is computed; waits for that, not for the experts."""
        copies = [self._copies.begin(part) for part in (hidden, expert_ids, expert_weights)]
        return Staged(self._routed.dispatch(layer, *(copy.wait() for copy in copies)), hidden.device)
