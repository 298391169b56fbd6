"""Placement of all layers: a fresh one, and the one nearest to what is in force that is as good.

The door to the compiled files. Tokens come in units in which the mean shard takes 1; homes are bool [layers,
experts, shards]. Every compiled function here walks over layers, which have nothing to do with each other.
"""

import numpy as np

from experts.compiled import compiled
from experts.placement_kicks import lighten_by_kicks
from experts.placement_layer import EMPTY, STRICTLY, Rooms, empty_layer, filled_layer
from experts.placement_pack import count_replicas, pack, pack_by_room, spread
from experts.placement_standing import (
    anchor_whole_groups,
    renamed_homes,
    settle_homeless,
    standing_layer,
)
from experts.placement_steps import lighten

NEAR = 1.001  # a fresh placement within this factor of its bound is not searched further
KICKS_MAX = 128  # tried in vain before what is in force is given up
ROUNDS_MAX = 1000  # a net under the search, many times what any load has needed
NO_CHANGES = np.zeros((0, 2), np.int64)


def fresh_homes(
    tokens: np.ndarray, rooms: Rooms, least: int, groups_count: int, slack: float, tries_max: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Homes, time of the slowest shard [layers] and its bound [layers].

    Groups keep to a host in the layers where that makes the slowest shard slower by no more than `slack`.
    """
    bound = lowest_times(tokens, rooms, least)
    anchor = np.full(tokens.shape, EMPTY)
    if groups_count == 1 or rooms.hosts_count == 1:
        return *searched_homes(tokens, anchor, rooms, least, bound * NEAR, tries_max), bound
    together = anchors_of_groups(tokens, rooms, groups_count)
    homes, time = searched_homes(tokens, together, rooms, least, bound * NEAR, tries_max)
    slow = np.flatnonzero(time > bound * (1 + slack))
    if len(slow):
        near = bound[slow] * NEAR
        apart, apart_time = searched_homes(tokens[slow], anchor[slow], rooms, least, near, tries_max)
        costly = time[slow] > apart_time * (1 + slack)
        homes[slow[costly]], time[slow[costly]] = apart[costly], apart_time[costly]
    return homes, time, bound


def searched_homes(
    tokens: np.ndarray, anchor: np.ndarray, rooms: Rooms, least: int, enough: np.ndarray, tries_max: int
) -> tuple[np.ndarray, np.ndarray]:
    """Homes and time [layers] of fresh placements, searched until `enough` [layers] or out of tries."""
    homes, time = search(tokens, anchor, rooms, least, enough, tries_max)
    slow = np.flatnonzero(time > enough)
    if tries_max and len(slow):
        moves_free = np.ones((len(slow), *homes.shape[1:]), np.bool_)
        start = tokens[slow], anchor[slow], moves_free, homes[slow], rooms
        homes[slow], time[slow] = improve(*start, least, enough[slow], tries_max, tries_max)
    return homes, time


def nearest_homes(
    tokens: np.ndarray,
    rooms: Rooms,
    least: int,
    groups_count: int,
    there: np.ndarray,
    fresh: np.ndarray,
    enough: np.ndarray,
) -> np.ndarray:
    """Homes by few moves from `there`, if the slowest shard gets to `enough` [layers]; else fresh ones."""
    homes, anchor, is_settled = settle(tokens, there, rooms, least, groups_count)
    homes[~is_settled] = fresh[~is_settled]
    start = tokens, anchor, there, homes, rooms
    homes, time = improve(*start, least, enough, ROUNDS_MAX, KICKS_MAX)
    for layer in np.flatnonzero(~is_settled | (time > enough)):
        homes[layer] = renamed_homes(fresh[layer], there[layer], rooms)
    return homes


@compiled
def search(tokens, anchor, rooms, least, enough, tries_max):
    """Homes and time [layers], packed with one count of replicas after another until `enough` [layers]."""
    homes = np.zeros((len(tokens), tokens.shape[1], len(rooms.slots)), np.bool_)
    time = np.zeros(len(tokens))
    for index in range(len(tokens)):
        counts = count_replicas(tokens[index], least, rooms.slots.sum(), len(rooms.slots))
        layer = packed_layer(tokens[index], anchor[index], counts, rooms, least)
        lighten(layer, rooms, least, enough[index])
        changes, next_change = NO_CHANGES, EMPTY
        for _ in range(tries_max):
            if layer.time.max() <= enough[index]:
                break
            if next_change == EMPTY:
                changes, next_change = count_changes(layer, least), 0
            if next_change == len(changes):
                break
            counts = changed_counts(layer.replicas, changes[next_change])
            other = packed_layer(tokens[index], anchor[index], counts, rooms, least)
            lighten(other, rooms, least, enough[index])
            next_change += 1
            if is_preferable(other, layer):
                layer, next_change = other, EMPTY
        homes[index], time[index] = layer.held, layer.time.max()
    return homes, time


@compiled
def improve(tokens, anchor, there, homes, rooms, least, enough, rounds_max, kicks_max):
    """Homes and time [layers] after steps and kicks of few moves from `there`, until `enough` [layers]."""
    homes, time = homes.copy(), np.zeros(len(tokens))
    for index in range(len(tokens)):
        layer = filled_layer(tokens[index], anchor[index], there[index], homes[index], rooms)
        layer = lighten_by_kicks(layer, rooms, least, enough[index], rounds_max, kicks_max)
        homes[index], time[index] = layer.held, layer.time.max()
    return homes, time


@compiled
def packed_layer(tokens, anchor, counts, rooms, least):
    """A first placement of these counts [experts] on as many hosts as there is room for."""
    moves_free = np.ones((len(tokens), len(rooms.slots)), np.bool_)
    layer = empty_layer(tokens, anchor.copy(), moves_free, counts, rooms)
    if not pack(layer, rooms):
        bare = np.full(len(tokens), EMPTY), moves_free, np.full(len(tokens), least)
        layer = empty_layer(tokens, *bare, rooms)
        pack_by_room(layer, rooms, least)
    spread(layer, rooms)
    return layer


@compiled
def is_preferable(other, layer):
    """Whether the other is lighter and has no more replicas beside their like while some host has none."""
    if other.time.max() >= layer.time.max() * STRICTLY:
        return False
    hosts_count = layer.held_by_host.shape[1]
    other_crowded = (np.minimum(other.replicas, hosts_count) - other.hosts_held).sum()
    return other_crowded <= (np.minimum(layer.replicas, hosts_count) - layer.hosts_held).sum()


@compiled
def count_changes(layer, least):
    """Pairs [changes, 2] to try: an expert with one replica less, one of the slowest shard's with one more.

    Those that lose least come first; the second is EMPTY where a slot is to stay empty.
    """
    shards_count, slowest = len(layer.used), np.argmax(layer.time)
    merged = np.full(len(layer.tokens), np.inf)
    for expert in range(len(merged)):
        if layer.replicas[expert] > least:
            merged[expert] = layer.tokens[expert] / (layer.replicas[expert] - 1)
    changes = np.empty((len(merged) * (layer.used[slowest] + 1), 2), np.int64)
    changes_count = 0
    for giver in np.argsort(merged, kind="mergesort"):
        if merged[giver] >= layer.time[slowest]:
            break
        for slot in range(layer.used[slowest] + 1):
            taker = layer.slots[slowest, slot] if slot < layer.used[slowest] else EMPTY
            if taker != giver and (taker == EMPTY or layer.replicas[taker] < shards_count):
                changes[changes_count] = giver, taker
                changes_count += 1
    return changes[:changes_count]


@compiled
def changed_counts(counts, change):
    """A copy of the counts [experts] after one change."""
    counts = counts.copy()
    counts[change[0]] -= 1
    if change[1] != EMPTY:
        counts[change[1]] += 1
    return counts


@compiled
def lowest_times(tokens, rooms, least):
    """What the slowest shard takes at least [layers], in any placement.

    It takes no less than the mean; nor than the heaviest share after the best possible replication, on the
    fastest shard; and where no slot is spare, no less than that share with the lightest others beside it.
    """
    slots_count = rooms.slots.sum()
    bound = np.ones(len(tokens))
    for index in range(len(tokens)):
        counts = count_replicas(tokens[index], least, slots_count, len(rooms.slots))
        share = tokens[index] / counts
        heaviest = share.max()
        if slots_count == least * len(share):
            heaviest += np.sort(share)[: rooms.slots.min() - 1].sum()
        bound[index] = max(1.0, heaviest * rooms.cost.min())
    return bound


@compiled
def anchors_of_groups(tokens, rooms, groups_count):
    """Hosts [layers, experts]: each group's, the heaviest group on the host with most time left for it.

    A group for which no host has slots enough has none.
    """
    size = tokens.shape[1] // groups_count
    anchor = np.full(tokens.shape, EMPTY)
    for index in range(len(tokens)):
        room, cost = np.zeros(rooms.hosts_count, np.int64), np.zeros(rooms.hosts_count)
        for shard in range(len(rooms.slots)):
            room[rooms.host[shard]] += rooms.slots[shard]
            cost[rooms.host[shard]] += 1 / rooms.cost[shard]
        cost = 1 / cost
        time = np.zeros(rooms.hosts_count)
        weight = tokens[index].copy().reshape(groups_count, size).sum(axis=1)
        for group in np.argsort(-weight, kind="mergesort"):
            time[room < size] = np.inf
            host = np.argmin(time)
            if room[host] >= size:
                anchor[index, group * size : (group + 1) * size] = host
                room[host] -= size
                time[host] += weight[group] * cost[host]
    return anchor


@compiled
def settle(tokens, there, rooms, least, groups_count):
    """What is there, with homes for all; hosts of whole groups [layers, experts]; whether all fits."""
    homes, is_settled = np.zeros(there.shape, np.bool_), np.zeros(len(tokens), np.bool_)
    anchor = np.full(tokens.shape, EMPTY)
    for index in range(len(tokens)):
        layer = standing_layer(tokens[index], there[index], rooms)
        anchor_whole_groups(layer, rooms, groups_count)
        is_settled[index] = settle_homeless(layer, rooms, least)
        homes[index], anchor[index] = layer.held, layer.anchor
    return homes, anchor, is_settled
