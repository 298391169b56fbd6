"""The experts that a shard has in memory, while placements change."""

from dataclasses import dataclass, field

from experts.errors import DispatchRefused
from experts.messages import DispatchHeader
from experts.weights import ExpertWeights
from kernels.ops.expert_mlp import GatedWeights


@dataclass(slots=True)
class Holding:
    """The experts of the newest placement, and those of earlier ones until every node goes by the newest.

    Nodes do that only when every shard has loaded its part, and until then the earlier placement must work.
    """

    epoch: int = 0
    experts: ExpertWeights = field(default_factory=dict)
    leaving: ExpertWeights = field(default_factory=dict)

    def get(self, pair: tuple[int, int]) -> GatedWeights | None:
        """Weights of a (layer, expert) pair, if they are here."""
        return self.experts.get(pair) or self.leaving.get(pair)

    def weights_of(self, header: DispatchHeader) -> list[GatedWeights]:
        """Weights of the experts that a dispatch names; raises DispatchRefused."""
        if header.epoch > self.epoch:
            raise DispatchRefused(f"epoch {header.epoch} is not here yet, {self.epoch} is")
        keys = [(header.layer, expert) for expert in header.expert_ids]
        found = [self.get(key) for key in keys]
        if None in found:
            expert = header.expert_ids[found.index(None)]
            raise DispatchRefused(f"expert {expert} of layer {header.layer} is not on this shard")
        return found
