"""Homes for a load on some shards, within their room: by search, or evenly until the search is compiled."""

import numpy as np

from experts.config import PlanConfig
from experts.messages import Homes, ShardAddress
from experts.placement import even_homes, filled
from experts.solve_placement import ShardRoom, solve_placement, warm_up
from kernels.model.config import ModelConfig


class Planner:
    """Makes plans; the same load, shards and homes in force give the same plan."""

    def __init__(self, config: PlanConfig, layers_count: int, experts_count: int, groups_count: int):
        self.config = config
        self.is_ready = False
        self._layers_count = layers_count
        self._experts_count = experts_count
        self._groups_count = groups_count

    @classmethod
    def of_model(cls, model: ModelConfig, config: PlanConfig) -> "Planner":
        """For all layers of a model that have experts."""
        groups_count = model.gate.groups_count if model.moe_layers else 1
        return cls(config, len(model.moe_layers), model.routed_experts_count, groups_count)

    def prepare(self) -> None:
        """Compile the search, or read it from disk: seconds."""
        warm_up()
        self.is_ready = True

    def __call__(self, load: np.ndarray, shards: tuple[ShardAddress, ...], current: Homes | None) -> Homes:
        """Homes for `load [layers, experts]`; raises PlacementImpossible for shards with too little room."""
        slots_count = self.slots_count(len(shards))
        # after a death there may be room for fewer replicas than wished for: better fewer than none
        possible = max(slots_count * len(shards) // self._experts_count, 1)
        replicas_min = min(self.config.replicas_min, len(shards), possible)
        if not self.is_ready:
            if current is not None:
                return filled(current, len(shards), replicas_min)
            return (even_homes(len(shards), self._experts_count, replicas_min),) * self._layers_count
        rooms = [ShardRoom(shard.host, slots_count) for shard in shards]
        plan = solve_placement(load, rooms, current, replicas_min, self._groups_count)
        return plan.homes

    def slots_count(self, shards_count: int) -> int:
        """Experts of each layer on each shard: as many as replicas take, within the shard's memory."""
        replicas_min = min(self.config.replicas_min, shards_count)
        replicas = self._experts_count * replicas_min
        replicas = max(replicas, self._experts_count + self.config.spare_replicas)
        return min(-(-replicas // shards_count), self.config.slots_max, self._experts_count)
