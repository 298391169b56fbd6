"""Which shard computes which slot of a dispatch: from a placement, by a rule that both ends can compute.

Experts with one home leave no choice. The slots of the others go, one after the other, to whichever of their
homes has fewest slots of this dispatch so far: so load is even inside a batch, not only on average. Ties go
to a home on the node's own host, then to the next in turn after the call's number.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from experts.messages import Placement
from kernels.ops.compiled import compiled


@dataclass(frozen=True, slots=True)
class ShardSlots:
    """What one shard computes of a dispatch."""

    shard: int
    experts: list[int]
    counts: list[int]
    slots: slice
    """Of the dispatch's order."""
    tokens: np.ndarray
    """Those it needs, ascending int64."""
    rows: np.ndarray
    """Which of these each of its slots takes, int32."""


class Route:
    """A placement in the form that dispatch needs."""

    def __init__(self, placement: Placement, host: str = ""):
        self.epoch = placement.epoch
        self.addresses = [shard.address for shard in placement.shards]
        self._first_layer = placement.first_layer
        self._near = np.array([bool(host) and shard.host == host for shard in placement.shards], np.bool_)
        self._ends: list[np.ndarray] = []
        self._homes: list[np.ndarray] = []
        for homes in placement.homes:
            counts = np.fromiter(map(len, homes), np.int64, len(homes))
            shards = np.array([shard for home in homes for shard in home], np.int64)
            if (counts < 1).any() or ((shards < 0) | (shards >= len(self.addresses))).any():
                raise ValueError(
                    "a placement leaves an expert without a home, or names shards that are not there"
                )
            self._ends.append(np.concatenate([[0], np.cumsum(counts)]))
            self._homes.append(shards)

    def split(
        self, layer: int, expert_ids: torch.Tensor, call_id: int, down: Collection[str] = ()
    ) -> tuple[torch.Tensor, list[ShardSlots]]:
        """Slots of `expert_ids [tokens, choices]` in the order of shard and expert, and what each shard has.

        Shards whose addresses are `down` get only what has no other home.
        """
        index = layer - self._first_layer
        if not 0 <= index < len(self._ends):
            raise ValueError(f"layer {layer} has no experts in the placement")
        flat = expert_ids.cpu().contiguous().view(-1).numpy()
        is_up = np.array([address not in down for address in self.addresses], np.bool_)
        order, rows, tokens, runs, ends = _split(
            flat, expert_ids.shape[1], self._ends[index], self._homes[index], is_up, self._near, call_id
        )
        return torch.from_numpy(order), list(_by_shard(rows, tokens, runs.tolist(), ends.tolist()))

    def has_others(self, layer: int, experts: Collection[int], down: Collection[str]) -> bool:
        """Whether each of these experts has a home that is not `down`."""
        ends, homes = self._ends[layer - self._first_layer], self._homes[layer - self._first_layer]
        return all(
            any(self.addresses[shard] not in down for shard in homes[ends[expert] : ends[expert + 1]])
            for expert in experts
        )


def _by_shard(
    rows: np.ndarray, tokens: np.ndarray, runs: list[list[int]], ends: list[list[int]]
) -> Iterator[ShardSlots]:
    slot = token = run = 0
    for shard, (slot_end, token_end, run_end) in enumerate(ends):
        if slot_end > slot:
            experts, counts = (list(part) for part in zip(*runs[run:run_end], strict=True))
            yield ShardSlots(
                shard, experts, counts, slice(slot, slot_end), tokens[token:token_end], rows[slot:slot_end]
            )
        slot, token, run = slot_end, token_end, run_end


@compiled(makes_arrays=True)
def _choose_shards(experts, ends, homes, is_up, near, call_id):
    """The shard of each slot."""
    loads = np.zeros(len(is_up), np.int64)
    chosen = np.empty(len(experts), np.int64)
    for several in (False, True):
        for slot in range(len(experts)):
            begin, end = ends[experts[slot]], ends[experts[slot] + 1]
            count = end - begin
            if (count > 1) != several:
                continue
            best = homes[begin + (call_id + slot) % count]
            for turn in range(1, count):
                shard = homes[begin + (call_id + slot + turn) % count]
                if is_up[shard] != is_up[best]:
                    better = is_up[shard]
                elif loads[shard] != loads[best]:
                    better = loads[shard] < loads[best]
                else:
                    better = near[shard] and not near[best]
                if better:
                    best = shard
            chosen[slot] = best
            loads[best] += 1
    return chosen


@compiled("(int64[::1], intp, int64[::1], int64[::1], boolean[::1], boolean[::1], int64)", makes_arrays=True)
def _split(experts, choices_count, ends, homes, is_up, near, call_id):
    """Order, rows, tokens by shard, (expert, slots) by shard, and where each shard's share of these ends."""
    slots_count, shards_count, experts_count = len(experts), len(is_up), len(ends) - 1
    shards = _choose_shards(experts, ends, homes, is_up, near, call_id)
    begins = np.zeros(shards_count * experts_count + 1, np.int64)
    for slot in range(slots_count):
        begins[shards[slot] * experts_count + experts[slot] + 1] += 1
    runs, runs_count = np.empty((slots_count, 2), np.int64), 0
    shard_ends = np.zeros((shards_count, 3), np.int64)
    for place in range(shards_count * experts_count):
        count = begins[place + 1]
        if count:
            runs[runs_count, 0], runs[runs_count, 1] = place % experts_count, count
            runs_count += 1
        begins[place + 1] += begins[place]
        shard_ends[place // experts_count, 0] = begins[place + 1]
        shard_ends[place // experts_count, 2] = runs_count
    order = np.empty(slots_count, np.int64)
    for slot in range(slots_count):
        place = shards[slot] * experts_count + experts[slot]
        order[begins[place]] = slot
        begins[place] += 1
    rows, tokens = np.empty(slots_count, np.int32), np.empty(slots_count, np.int64)
    row_of = np.empty(slots_count // choices_count, np.int32)
    tokens_count, slot_begin = 0, 0
    for shard in range(shards_count):
        slot_end, first = shard_ends[shard, 0], tokens_count
        row_of[:] = -1
        for slot in range(slot_begin, slot_end):
            row_of[order[slot] // choices_count] = 0
        for token in range(len(row_of)):
            if row_of[token] == 0:
                row_of[token] = tokens_count - first
                tokens[tokens_count] = token
                tokens_count += 1
        for slot in range(slot_begin, slot_end):
            rows[slot] = row_of[order[slot] // choices_count]
        shard_ends[shard, 1] = tokens_count
        slot_begin = slot_end
    return order, rows, tokens[:tokens_count], runs[:runs_count], shard_ends
