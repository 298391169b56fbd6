"""A way on when no step helps, compiled: one more replica, though it does harm, then steps that undo it."""

from typing import NamedTuple

import numpy as np

from experts.compiled import compiled, in_place
from experts.placement_layer import (
    EMPTY,
    STRICTLY,
    Layer,
    may_come,
    may_move,
    may_vanish,
    put,
    recount,
    take,
    time_without,
)
from experts.placement_steps import lighten


class Kick(NamedTuple):
    """One more replica of `expert` on `target`, from where `passed` (or EMPTY) goes to `room`.

    The slot in the room is an empty one, or that of `other`, which loses a replica.
    """

    harm: float  # time of the slowest shard that gets slower
    expert: int
    target: int
    passed: int
    room: int
    other: int


@compiled
def copied_layer(layer):
    """The same, to come back to."""
    return Layer(
        layer.tokens,
        layer.anchor,
        layer.there,
        layer.replicas.copy(),
        layer.share.copy(),
        layer.held.copy(),
        layer.homes.copy(),
        layer.homes_count.copy(),
        layer.held_by_host.copy(),
        layer.hosts_held.copy(),
        layer.slots.copy(),
        layer.used.copy(),
        layer.time.copy(),
    )


@compiled
def lighten_by_kicks(layer, rooms, least, enough, rounds_max, kicks_max):
    """The layer lightened until `enough`; where steps get stuck, each round tries `kicks_max` kicks."""
    lighten(layer, rooms, least, enough)
    for _ in range(rounds_max):
        if layer.time.max() <= enough:
            break
        lighter = kicked_layer(layer, rooms, least, enough, kicks_max)
        if lighter.time.max() >= layer.time.max() * STRICTLY:
            break
        layer = lighter
    return layer


@compiled
def kicked_layer(layer, rooms, least, enough, kicks_max):
    """The first that ends lighter after a kick; the same layer if none does.

    Each expert of the slowest shard, heaviest first, has its part of the kicks, the least harmful first.
    """
    source = np.argmax(layer.time)
    experts = layer.slots[source, : layer.used[source]]
    kicks_each = -(-kicks_max // len(experts))
    for slot in np.argsort(-layer.share[experts], kind="mergesort"):
        harm = -np.inf
        for _ in range(kicks_each):
            kick = next_kick(layer, rooms, least, experts[slot], harm)
            if kick.target == EMPTY:
                break
            tried = copied_layer(layer)
            take_kick(tried, rooms, kick)
            lighten(tried, rooms, least, enough)
            if tried.time.max() < layer.time[source] * STRICTLY:
                return tried
            harm = kick.harm
    return layer


@in_place
def next_kick(layer, rooms, least, expert, harm_min):
    """The least harmful kick above `harm_min`; its target is EMPTY if there is none."""
    best = Kick(np.inf, expert, EMPTY, EMPTY, EMPTY, EMPTY)
    for room in range(len(rooms.slots)):
        for slot in range(min(layer.used[room] + 1, rooms.slots[room])):
            other = layer.slots[room, slot]
            room_time, others_time = layer.time[room], 0.0
            if other != EMPTY:
                if other == expert or not may_vanish(layer, rooms, other, room, least):
                    continue
                room_time -= layer.share[other] * rooms.cost[room]
                others_time = time_without(layer, rooms, other, room, room, best.harm)
            if others_time < best.harm:
                best = best_kick_into(layer, rooms, room, other, room_time, others_time, harm_min, best)
    return best


@in_place
def best_kick_into(layer, rooms, room, other, room_time, others_time, harm_min, best):
    """Kicks into the slot of `other` on `room`: the expert itself, or one that makes room for it."""
    expert = best.expert
    share = layer.tokens[expert] / (layer.replicas[expert] + 1)
    for target in range(len(rooms.slots)):
        if not may_come(layer, rooms, expert, target):
            continue
        if target == room:
            harm = max(others_time, room_time + share * rooms.cost[room])
            if harm_min < harm < best.harm:
                best = Kick(harm, expert, target, EMPTY, room, other)
            continue
        target_time = layer.time[target] + share * rooms.cost[target]
        for slot in range(layer.used[target]):
            passed = layer.slots[target, slot]
            room_harm = room_time + layer.share[passed] * rooms.cost[room]
            harm = max(others_time, room_harm, target_time - layer.share[passed] * rooms.cost[target])
            if not harm_min < harm < best.harm or passed == other or layer.held[passed, room]:
                continue
            if may_move(layer, rooms, passed, target, room):
                best = Kick(harm, expert, target, passed, room, other)
    return best


@in_place
def take_kick(layer, rooms, kick):
    """Change the layer."""
    if kick.other != EMPTY:
        take(layer, rooms, kick.other, kick.room)
        recount(layer, rooms, kick.other, layer.replicas[kick.other] - 1)
    if kick.passed != EMPTY:
        take(layer, rooms, kick.passed, kick.target)
        put(layer, rooms, kick.passed, kick.room)
    recount(layer, rooms, kick.expert, layer.replicas[kick.expert] + 1)
    put(layer, rooms, kick.expert, kick.target)
