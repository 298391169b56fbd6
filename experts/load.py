"""How many tokens each expert has had."""

from collections.abc import Sequence

import numpy as np


class ExpertLoad:
    """Slots computed for each MoE layer and expert, counted since the beginning."""

    def __init__(self, first_layer: int, layers_count: int, experts_count: int):
        self._first_layer = first_layer
        self._slots = np.zeros((layers_count, experts_count), dtype=np.int64)

    def add(self, layer: int, expert_ids: Sequence[int], slot_counts: Sequence[int]) -> None:
        """Count one step's slots of one layer; each expert is named once."""
        self._slots[layer - self._first_layer, list(expert_ids)] += np.asarray(slot_counts, dtype=np.int64)

    @property
    def slots_count(self) -> int:
        """Slots of all layers and experts together."""
        return int(self._slots.sum())

    def table(self) -> tuple[tuple[int, ...], ...]:
        """Slots by MoE layer, then expert."""
        return tuple(tuple(row) for row in self._slots.tolist())
