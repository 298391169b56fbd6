"""A first placement of one layer, compiled: how many replicas of each expert, and a shard for each."""

import numpy as np

from experts.compiled import compiled, in_place, inlined
from experts.placement_layer import EMPTY, exchange, may_move, put, recount


@compiled
def count_replicas(tokens, least, slots_count, shards_count):
    """Replicas of each expert [experts]: the heaviest share is split again until the slots are used.

    No other counts have a lighter heaviest share.
    """
    replicas = np.full(len(tokens), least)
    share = tokens / least
    if least == shards_count:
        return replicas
    for _ in range(slots_count - least * len(tokens)):
        heaviest = np.argmax(share)
        if share[heaviest] == EMPTY:
            break  # every expert is on every shard
        replicas[heaviest] += 1
        is_full = replicas[heaviest] == shards_count
        share[heaviest] = EMPTY if is_full else tokens[heaviest] / replicas[heaviest]
    return replicas


@compiled
def pack(layer, rooms):
    """Each replica, heaviest first, onto the shard with most time left; False where slots do not suffice."""
    return pack_in_order(
        layer, rooms, np.argsort(-layer.share, kind="mergesort"), np.zeros(rooms.hosts_count, np.int64)
    )


@in_place
def pack_in_order(layer, rooms, experts, open_slots):
    """The replicas of `experts` one after the other.

    On every host as many of the `open_slots` [hosts], zeros at first, stay free as anchored experts are
    still to come. Where shards are not equal, the mean of what is still to come is kept free for each slot.
    """
    for shard in range(len(rooms.slots)):
        open_slots[rooms.host[shard]] += rooms.slots[shard]
    for home in layer.anchor:
        if home != EMPTY:
            open_slots[home] -= 1
    coming, coming_count = 0.0, layer.replicas.sum()
    if rooms.slots.min() < rooms.slots.max():
        coming = layer.tokens.sum()
    for expert in experts:
        home = layer.anchor[expert]
        if home != EMPTY:
            open_slots[home] += 1
        for _ in range(layer.replicas[expert]):
            shard = soonest_shard(layer, rooms, expert, home, open_slots, coming / coming_count)
            if shard == EMPTY:
                return False
            put(layer, rooms, expert, shard)
            open_slots[rooms.host[shard]] -= 1
            coming = max(coming - layer.share[expert], 0.0)
            coming_count -= 1
            home = EMPTY
    return True


@inlined
def soonest_shard(layer, rooms, expert, home, open_slots, coming):
    """Where most time is left: on `home`, else on a host without the expert, else on any; or EMPTY.

    Each free slot is taken to get `coming` tokens: a shard with more slots than others shall have time for
    what will fill them.
    """
    others_max = 0
    if layer.hosts_held[expert] == rooms.hosts_count:
        others_max = len(rooms.slots)
    while True:
        best, best_time = EMPTY, np.inf
        for shard in range(len(rooms.slots)):
            free = rooms.slots[shard] - layer.used[shard]
            time = layer.time[shard] + free * coming * rooms.cost[shard]
            if time >= best_time or free == 0:
                continue
            host = rooms.host[shard]
            allowed = host == home or (home == EMPTY and open_slots[host] > 0)
            if allowed and not layer.held[expert, shard] and layer.held_by_host[expert, host] <= others_max:
                best, best_time = shard, time
        if best != EMPTY or others_max > 0:
            return best
        others_max = len(rooms.slots)


@compiled
def pack_by_room(layer, rooms, least):
    """`least` replicas of each expert, always on the shards with most free slots, then spare ones that fit.

    The first part succeeds wherever any placement does (Gale and Ryser, on degrees of bipartite graphs).
    """
    for expert in range(len(layer.tokens)):
        for _ in range(least):
            put(layer, rooms, expert, roomiest_shard(layer, rooms, expert))
    share = layer.share.copy()
    open_slots = np.full(rooms.hosts_count, len(layer.tokens))
    while share.max() > EMPTY:
        heaviest = np.argmax(share)
        shard = soonest_shard(layer, rooms, heaviest, EMPTY, open_slots, 0.0)
        if shard == EMPTY:
            share[heaviest] = EMPTY
            continue
        recount(layer, rooms, heaviest, layer.replicas[heaviest] + 1)
        put(layer, rooms, heaviest, shard)
        share[heaviest] = layer.share[heaviest]


@in_place
def roomiest_shard(layer, rooms, expert):
    """The shard with most free slots of those without the expert; of equals one on a host without it."""
    best, best_free, best_others = EMPTY, 0, 0
    for shard in range(len(rooms.slots)):
        free = rooms.slots[shard] - layer.used[shard]
        others = layer.held_by_host[expert, rooms.host[shard]]
        if free == 0 or layer.held[expert, shard]:
            continue
        if free > best_free or (free == best_free and others < best_others):
            best, best_free, best_others = shard, free, others
    return best


@in_place
def spread(layer, rooms):
    """Replicas that share a host go to hosts without their expert, where a slot or an exchange allows it."""
    for expert in range(len(layer.tokens)):
        while layer.hosts_held[expert] < min(layer.replicas[expert], rooms.hosts_count):
            if not spread_one(layer, rooms, expert):
                break


@in_place
def spread_one(layer, rooms, expert):
    """Move one replica so; False if none can be moved."""
    best = (EMPTY, EMPTY, EMPTY)
    best_worst = np.inf
    for source in range(len(rooms.slots)):
        if not layer.held[expert, source] or layer.held_by_host[expert, rooms.host[source]] == 1:
            continue
        for target in range(len(rooms.slots)):
            if layer.held_by_host[expert, rooms.host[target]] > 0:
                continue
            for place in range(min(layer.used[target] + 1, rooms.slots[target])):
                other = layer.slots[target, place]
                change = layer.share[expert] - (0.0 if other == EMPTY else layer.share[other])
                worst = max(
                    layer.time[source] - change * rooms.cost[source],
                    layer.time[target] + change * rooms.cost[target],
                )
                if worst >= best_worst or (
                    other != EMPTY
                    and (layer.held[other, source] or not may_move(layer, rooms, other, target, source))
                ):
                    continue
                best, best_worst = (source, target, other), worst
    source, target, other = best
    if source == EMPTY:
        return False
    exchange(layer, rooms, expert, source, target, other)
    return True
