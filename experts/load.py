"""How many tokens each expert has had: counted by shards, remembered as long as it tells what will come."""

from collections.abc import Sequence

import numpy as np

BURST_SLOTS_MIN = 10  # for each expert on average


class ExpertLoad:
    """Slots computed for each MoE layer and expert, counted since the beginning."""

    def __init__(self, first_layer: int, layers_count: int, experts_count: int):
        self._first_layer = first_layer
        self._slots = np.zeros((layers_count, experts_count), dtype=np.int64)

    def add(self, layer: int, expert_ids: Sequence[int], slot_counts: Sequence[int]) -> None:
        """Count one step's slots of one layer; each expert is named once."""
        self._slots[layer - self._first_layer, expert_ids] += slot_counts

    @property
    def slots_count(self) -> int:
        """Slots of all layers and experts together."""
        return int(self._slots.sum())

    def told(self) -> bytes:
        """The table as it travels, for `RecentLoad.read`: counts beyond 32 bits begin again at 0."""
        return self._slots.astype(np.uint32).tobytes()


class RecentLoad:
    """Slots `[layers, experts]` of late, from totals that shards report: an average that forgets by halves.

    What has come in a burst counts as much as what has come for long: of a short and a long memory, each in
    shares of its own sum, the greater share is taken.
    """

    def __init__(self, layers_count: int, experts_count: int, half_life_s: float, burst_half_life_s: float):
        self._half_lives_s = np.array([half_life_s, burst_half_life_s])[:, None, None]
        self._memories = np.zeros((2, layers_count, experts_count))
        self._totals: dict[str, np.ndarray] = {}
        self._now_s: float | None = None

    def observe(self, shard: str, totals: np.ndarray | Sequence[Sequence[int]], now_s: float) -> None:
        """Take a shard's totals since it began; the first are from before anybody listened, and count not."""
        table = np.asarray(totals, dtype=np.int64)
        if table.shape != self._memories.shape[1:]:
            raise ValueError(f"a load of shape {table.shape}, it must be {self._memories.shape[1:]}")
        before = self._totals.get(shard)
        self._totals[shard] = table
        self._forget(now_s)
        if before is not None and (table >= before).all():
            self._memories += table - before

    def read(self, shard: str, told: bytes) -> np.ndarray:
        """Totals `[layers, experts]` from what a shard told; raises ValueError for what is no such table.

        Less than before where a shard began anew under its name.
        """
        low = np.frombuffer(told, dtype=np.uint32).reshape(self._memories.shape[1:])
        before = self._totals.get(shard)
        if before is None:
            return low.astype(np.int64)
        return before + (low - before.astype(np.uint32)).view(np.int32)

    def leave(self, shard: str) -> None:
        """A shard has gone; what it computed is still remembered."""
        self._totals.pop(shard, None)

    @property
    def slots_count(self) -> float:
        """How much the long memory rests on, in slots."""
        return float(self._memories[0].sum())

    def shares(self) -> np.ndarray:
        """What to expect of each expert, `[layers, experts]`: about 1 in each layer, 0 if nothing came."""
        sums = self._memories.sum(axis=2, keepdims=True)
        few = sums[1] < BURST_SLOTS_MIN * self._memories.shape[2]
        sums[1][few] = 0  # a few tokens are no burst
        return np.divide(self._memories, sums, out=np.zeros_like(self._memories), where=sums > 0).max(axis=0)

    def _forget(self, now_s: float) -> None:
        if self._now_s is not None:
            self._memories *= 0.5 ** (max(now_s - self._now_s, 0.0) / self._half_lives_s)
        self._now_s = now_s
