"""One layer while its placement is searched, compiled: which expert is where, and what that takes.

A replica on a shard takes its tokens times the shard's cost; the mean over all shards is 1. Ties go to the
lowest index, so that the same input gives the same plan on any machine.
"""

from typing import NamedTuple

import numpy as np

from experts.compiled import compiled, in_place, inlined

EMPTY = -1
STRICTLY = 1 - 1e-9  # what gains must gain more than rounding


class Rooms(NamedTuple):
    """Shards as arrays: slots for experts of a layer, time that a token takes, host."""

    slots: np.ndarray  # [shards] int64
    cost: np.ndarray  # [shards] float64
    host: np.ndarray  # [shards] int64
    hosts_count: int


class Layer(NamedTuple):
    """Replicas of every expert, seen from the expert, the host and the shard."""

    tokens: np.ndarray  # [experts] float64
    anchor: np.ndarray  # [experts] int64, host where one replica stays, or EMPTY
    there: np.ndarray  # [experts, shards] bool, replicas that need not be loaded
    replicas: np.ndarray  # [experts] int64
    share: np.ndarray  # [experts] float64, tokens of each replica
    held: np.ndarray  # [experts, shards] bool
    homes: np.ndarray  # [experts, shards] uint16, the same as lists: of each row so many, in no order,
    homes_count: np.ndarray  # [experts] int64, as are counted here
    held_by_host: np.ndarray  # [experts, hosts] int64
    hosts_held: np.ndarray  # [experts] int64, different hosts
    slots: np.ndarray  # [shards, slots] int64, expert in each; used ones come first
    used: np.ndarray  # [shards] int64
    time: np.ndarray  # [shards] float64


@compiled
def empty_layer(tokens, anchor, there, replicas, rooms):
    """A layer with `replicas` [experts] planned and none placed."""
    experts_count, shards_count = there.shape
    return Layer(
        tokens,
        anchor,
        there,
        replicas,
        tokens / replicas,
        np.zeros((experts_count, shards_count), np.bool_),
        np.empty((experts_count, shards_count), np.uint16),
        np.zeros(experts_count, np.int64),
        np.zeros((experts_count, rooms.hosts_count), np.int64),
        np.zeros(experts_count, np.int64),
        np.full((shards_count, rooms.slots.max()), EMPTY),
        np.zeros(shards_count, np.int64),
        np.zeros(shards_count),
    )


@inlined
def put(layer, rooms, expert, shard):
    """Into the first free slot."""
    layer.slots[shard, layer.used[shard]] = expert
    layer.used[shard] += 1
    layer.held[expert, shard] = True
    layer.homes[expert, layer.homes_count[expert]] = shard
    layer.homes_count[expert] += 1
    host = rooms.host[shard]
    layer.hosts_held[expert] += layer.held_by_host[expert, host] == 0
    layer.held_by_host[expert, host] += 1
    layer.time[shard] += layer.share[expert] * rooms.cost[shard]


@compiled
def filled_layer(tokens, anchor, there, homes, rooms):
    """A layer with everything at home, `homes` being bool [experts, shards]."""
    layer = empty_layer(tokens, anchor.copy(), there, np.maximum(homes.sum(axis=1), 1), rooms)
    fill(layer, rooms, homes)
    return layer


@in_place
def fill(layer, rooms, homes):
    """Put everything where `homes` [experts, shards] says."""
    for expert in range(len(layer.tokens)):
        for shard in range(len(rooms.slots)):
            if homes[expert, shard]:
                put(layer, rooms, expert, shard)


@inlined
def take(layer, rooms, expert, shard):
    """Out of its slot, which the last used one fills."""
    last = layer.used[shard] - 1
    for slot in range(last):
        if layer.slots[shard, slot] == expert:
            layer.slots[shard, slot] = layer.slots[shard, last]
    layer.slots[shard, last] = EMPTY
    layer.used[shard] = last
    layer.held[expert, shard] = False
    layer.homes_count[expert] -= 1
    for index in range(layer.homes_count[expert]):
        if layer.homes[expert, index] == shard:
            layer.homes[expert, index] = layer.homes[expert, layer.homes_count[expert]]
    host = rooms.host[shard]
    layer.held_by_host[expert, host] -= 1
    layer.hosts_held[expert] -= layer.held_by_host[expert, host] == 0
    layer.time[shard] -= layer.share[expert] * rooms.cost[shard]


@in_place
def exchange(layer, rooms, expert, source, target, other):
    """`expert` goes to the target, `other` (or EMPTY) back."""
    take(layer, rooms, expert, source)
    if other != EMPTY:
        take(layer, rooms, other, target)
        put(layer, rooms, other, source)
    put(layer, rooms, expert, target)


@in_place
def recount(layer, rooms, expert, replicas):
    """Another number of replicas: every shard that holds the expert computes another share of its tokens."""
    share = layer.tokens[expert] / replicas
    for shard in layer.homes[expert, : layer.homes_count[expert]]:
        layer.time[shard] += (share - layer.share[expert]) * rooms.cost[shard]
    layer.replicas[expert] = replicas
    layer.share[expert] = share


@inlined
def may_move(layer, rooms, expert, source, target):
    """Whether a replica may go from shard to shard without crowding a host or leaving its anchor."""
    here, there = rooms.host[source], rooms.host[target]
    if here == there:
        return True
    if layer.anchor[expert] == here and layer.held_by_host[expert, here] == 1:
        return False
    return layer.held_by_host[expert, there] < layer.held_by_host[expert, here]


@inlined
def may_come(layer, rooms, expert, target):
    """Whether one more replica may come: to a host that has none, unless all hosts have one."""
    if layer.held[expert, target]:
        return False
    everywhere = layer.hosts_held[expert] == rooms.hosts_count
    return everywhere or layer.held_by_host[expert, rooms.host[target]] == 0


@inlined
def may_vanish(layer, rooms, expert, source, least):
    """Whether a replica can be spared: enough are left, one at the anchor, on as many hosts as can be."""
    if layer.replicas[expert] <= least:
        return False
    host = rooms.host[source]
    if layer.held_by_host[expert, host] > 1:
        return True
    return layer.anchor[expert] != host and layer.hosts_held[expert] == layer.replicas[expert]


@inlined
def time_without(layer, rooms, expert, leaving, source, limit):
    """Slowest of an expert's shards, but `leaving` and `source`, with the tokens of the one that leaves.

    Beyond the limit any number beyond it will do.
    """
    more = layer.tokens[expert] / (layer.replicas[expert] - 1) - layer.share[expert]
    worst = 0.0
    for shard in layer.homes[expert, : layer.homes_count[expert]]:
        if shard != leaving and shard != source:
            worst = max(worst, layer.time[shard] + more * rooms.cost[shard])
            if worst > limit:
                break
    return worst
