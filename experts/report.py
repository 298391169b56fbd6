"""What is told of experts: where they are, how loaded, and what moves."""

from dataclasses import dataclass

from experts.balance import Balance
from experts.messages import Placement


@dataclass(frozen=True, slots=True)
class ExpertsReport:
    """Numbers about a group of shards; loads are shares of a layer's slots of late, 0 where none came."""

    placement: Placement | None
    shard_loads: tuple[tuple[float, ...], ...]
    """By MoE layer and shard."""
    expert_loads: tuple[tuple[float, ...], ...]
    """By MoE layer and expert."""
    balance: Balance
    is_moving: bool
    is_stalled: bool
    rebalances_count: int
    rollbacks_count: int
    stalls_count: int
    problem: str = ""
    """Why the shards there are cannot be placed on; empty where they can."""
