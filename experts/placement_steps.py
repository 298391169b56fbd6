"""Steps that lighten the slowest shard of one layer, compiled: exchanges, more replicas, fewer replicas."""

from typing import NamedTuple

import numpy as np

from experts.compiled import in_place, inlined
from experts.placement_layer import (
    EMPTY,
    STRICTLY,
    exchange,
    may_come,
    may_move,
    may_vanish,
    put,
    recount,
    take,
    time_without,
)

NOTHING, EXCHANGE, REPLICATE, DROP = 0, 1, 2, 3
STEPS_MAX = 2000  # a net under the search, many times what any load has needed


class Step(NamedTuple):
    """`expert` moves or is replicated from `source` to `target`; `other` there comes back or is dropped."""

    kind: int
    worst: float  # time of the slowest shard touched, afterwards
    moves: int  # replicas to be loaded, more than before; negative where one comes back to where it was
    source: int
    expert: int
    target: int
    other: int


@in_place
def lighten(layer, rooms, least, enough):
    """Lighten the slowest shard, step by step, until `enough` or until no step helps.

    Each step leaves all shards that it touches faster than the slowest was, so that the search ends.
    """
    for _ in range(STEPS_MAX):
        source = np.argmax(layer.time)
        if layer.time[source] <= enough:
            return
        step = best_exchange(layer, rooms, source, enough)
        if step.kind == NOTHING or step.moves > 0:
            step = best_recount(layer, rooms, least, enough, step)
        if step.kind == NOTHING:
            return
        take_step(layer, rooms, step)


@inlined
def is_better(worst, moves, step, enough):
    """Of steps that lighten enough, fewer moves are better, then lighter ones; of others lighter ones."""
    if worst > enough:
        return worst < step.worst
    if step.worst > enough:
        return True
    return moves < step.moves or (moves == step.moves and worst < step.worst)


@in_place
def best_exchange(layer, rooms, source, enough):
    """One expert of the source for one of another shard, or for an empty slot there."""
    time = layer.time[source]
    step = Step(NOTHING, time * STRICTLY, 0, source, EMPTY, source, EMPTY)
    shards_count = len(rooms.slots)
    lightest = np.argmin(layer.time)
    for offset in range(shards_count):
        target = lightest + offset - (shards_count if lightest + offset >= shards_count else 0)
        if target == source or not may_even(layer, rooms, source, target, max(step.worst, enough)):
            continue
        step = best_exchange_with(layer, rooms, source, target, enough, step)
        if step.worst <= enough and step.moves <= 0:
            break
    return step


@inlined
def may_even(layer, rooms, source, target, limit):
    """Whether two shards would both get below the limit, could tokens be parted between them at will."""
    source_cost, target_cost = rooms.cost[source], rooms.cost[target]
    whole = layer.time[source] * target_cost + layer.time[target] * source_cost
    return whole < limit * (source_cost + target_cost)


@inlined
def best_exchange_with(layer, rooms, source, target, enough, step):
    """The same with one other shard; arithmetic first, since few pairs of experts pass it."""
    source_time, target_time = layer.time[source], layer.time[target]
    source_cost, target_cost = rooms.cost[source], rooms.cost[target]
    places = min(layer.used[target] + 1, rooms.slots[target])
    for slot in range(layer.used[source]):
        expert = layer.slots[source, slot]
        share = layer.share[expert]
        for place in range(places):
            other = layer.slots[target, place]
            change = share - (0.0 if other == EMPTY else layer.share[other])
            worst = max(source_time - change * source_cost, target_time + change * target_cost)
            if worst > enough and worst >= step.worst:
                continue
            if layer.held[expert, target] or not may_move(layer, rooms, expert, source, target):
                continue
            moves = np.int64(layer.there[expert, source]) - np.int64(layer.there[expert, target])
            if other != EMPTY:
                if layer.held[other, source] or not may_move(layer, rooms, other, target, source):
                    continue
                moves += np.int64(layer.there[other, target]) - np.int64(layer.there[other, source])
            if is_better(worst, moves, step, enough):
                step = Step(EXCHANGE, worst, moves, source, expert, target, other)
    return step


@in_place
def best_recount(layer, rooms, least, enough, step):
    """One replica more of an expert of the source, in an empty slot or in place of another; or one less."""
    step = best_drop(layer, rooms, least, enough, step)
    for target in range(len(rooms.slots)):
        if target == step.source:
            continue
        if layer.used[target] < rooms.slots[target]:
            step = best_replica(layer, rooms, target, EMPTY, enough, step)
        for slot in range(layer.used[target]):
            other = layer.slots[target, slot]
            if may_vanish(layer, rooms, other, target, least):
                step = best_replica(layer, rooms, target, other, enough, step)
    return step


@in_place
def best_drop(layer, rooms, least, enough, step):
    """One replica less on the source, where its siblings have time for its tokens."""
    source = step.source
    for slot in range(layer.used[source]):
        expert = layer.slots[source, slot]
        if may_vanish(layer, rooms, expert, source, least):
            left = layer.time[source] - layer.share[expert] * rooms.cost[source]
            worst = max(left, time_without(layer, rooms, expert, source, source, max(step.worst, enough)))
            moves = np.int64(layer.there[expert, source]) - 1
            if is_better(worst, moves, step, enough):
                step = Step(DROP, worst, moves, source, EMPTY, source, expert)
    return step


@inlined
def best_replica(layer, rooms, target, other, enough, step):
    """One replica more on the target of an expert of the source, in place of `other` unless it is EMPTY."""
    source, limit = step.source, max(step.worst, enough)
    source_time, target_time, others_time, moves = layer.time[source], layer.time[target], 0.0, 1
    if other != EMPTY:
        others_time = time_without(layer, rooms, other, target, source, limit)
        if others_time > limit:
            return step
        more = layer.tokens[other] / (layer.replicas[other] - 1) - layer.share[other]
        source_time += more * rooms.cost[source] * layer.held[other, source]
        target_time -= layer.share[other] * rooms.cost[target]
        moves -= 1 - np.int64(layer.there[other, target])
    for slot in range(layer.used[source]):
        expert = layer.slots[source, slot]
        if expert == other or not may_come(layer, rooms, expert, target):
            continue
        share = layer.tokens[expert] / (layer.replicas[expert] + 1)
        left = source_time - (layer.share[expert] - share) * rooms.cost[source]
        worst = max(left, target_time + share * rooms.cost[target], others_time)
        moves_here = moves - np.int64(layer.there[expert, target])
        if is_better(worst, moves_here, step, enough):
            step = Step(REPLICATE, worst, moves_here, source, expert, target, other)
    return step


@in_place
def take_step(layer, rooms, step):
    """Change the layer."""
    if step.kind == EXCHANGE:
        exchange(layer, rooms, step.expert, step.source, step.target, step.other)
        return
    if step.other != EMPTY:
        take(layer, rooms, step.other, step.target)
        recount(layer, rooms, step.other, layer.replicas[step.other] - 1)
    if step.kind == REPLICATE:
        recount(layer, rooms, step.expert, layer.replicas[step.expert] + 1)
        put(layer, rooms, step.expert, step.target)
