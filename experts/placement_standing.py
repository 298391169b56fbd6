"""What is in force in one layer, compiled: kept as the beginning of a search, or renamed to be like it."""

import numpy as np

from experts.compiled import compiled, in_place
from experts.placement_layer import EMPTY, filled_layer, may_vanish, put, recount, take
from experts.placement_pack import soonest_shard


@compiled
def standing_layer(tokens, there, rooms):
    """What is there and still has a slot, first homes before second ones."""
    experts_count, shards_count = there.shape
    free = rooms.slots.copy()
    stays = np.zeros(there.shape, np.bool_)
    for only_first in (True, False):
        for expert in range(experts_count):
            for shard in range(shards_count):
                if there[expert, shard] and free[shard] > 0 and not stays[expert, shard]:
                    stays[expert, shard] = True
                    free[shard] -= 1
                    if only_first:
                        break
    return filled_layer(tokens, np.full(experts_count, EMPTY), there, stays, rooms)


@compiled
def anchor_whole_groups(layer, rooms, groups_count):
    """Groups that have all their experts on one host stay there."""
    size = len(layer.tokens) // groups_count
    if groups_count == 1 or rooms.hosts_count == 1:
        return
    for group in range(groups_count):
        for host in range(rooms.hosts_count):
            if np.all(layer.held_by_host[group * size : (group + 1) * size, host] > 0):
                layer.anchor[group * size : (group + 1) * size] = host
                break


@compiled
def settle_homeless(layer, rooms, least):
    """Homes for experts with fewer than `least`; False where spare replicas of others do not make room."""
    open_slots = np.full(rooms.hosts_count, len(layer.tokens))
    for expert in range(len(layer.tokens)):
        while layer.homes_count[expert] < least:
            shard = soonest_shard(layer, rooms, expert, EMPTY, open_slots, 0.0)
            if shard == EMPTY:
                shard = make_room(layer, rooms, expert, least)
            if shard == EMPTY:
                return False
            recount(layer, rooms, expert, layer.homes_count[expert] + 1)
            put(layer, rooms, expert, shard)
    return True


@in_place
def make_room(layer, rooms, newcomer, least):
    """A shard without the newcomer where the replica missed least has made room; EMPTY if there is none."""
    best, best_expert, best_share = EMPTY, EMPTY, np.inf
    for shard in range(len(rooms.slots)):
        for slot in range(layer.used[shard]):
            expert = layer.slots[shard, slot]
            if layer.held[newcomer, shard] or not may_vanish(layer, rooms, expert, shard, least):
                continue
            share = layer.tokens[expert] / (layer.replicas[expert] - 1)
            if share < best_share:
                best, best_expert, best_share = shard, expert, share
    if best != EMPTY:
        take(layer, rooms, best_expert, best)
        recount(layer, rooms, best_expert, layer.replicas[best_expert] - 1)
    return best


@compiled
def renamed_homes(fresh, there, rooms):
    """Fresh homes [experts, shards], alike shards of a host exchanged so that much of what is there stays."""
    shards_count = len(rooms.slots)
    kept = np.zeros((shards_count, shards_count), np.int64)
    for expert in range(len(fresh)):
        for shard in range(shards_count):
            if fresh[expert, shard]:
                kept[shard] += there[expert]
    homes = np.zeros(fresh.shape, np.bool_)
    is_named, is_taken = np.zeros(shards_count, np.bool_), np.zeros(shards_count, np.bool_)
    for pair in np.argsort(-kept.ravel(), kind="mergesort"):
        shard, name = pair // shards_count, pair % shards_count
        alike = (
            rooms.host[shard] == rooms.host[name]
            and rooms.slots[shard] == rooms.slots[name]
            and rooms.cost[shard] == rooms.cost[name]
        )
        if alike and not is_named[shard] and not is_taken[name]:
            homes[:, name] = fresh[:, shard]
            is_named[shard] = is_taken[name] = True
    return homes
