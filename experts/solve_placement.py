"""Which expert gets how many replicas, and where, from how many tokens each has had: a pure function.

Objectives in order: every expert has a home; it has `replicas_min`, on different shards; on different hosts
as far as there is room; the slowest shard of each layer is as fast as can be; little moves; groups keep to a
host. A shard's time is its tokens over its speed, an expert's tokens shared evenly by its replicas. Shards
with more slots than others are not taken to be faster: slots are memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experts.compiled import mark_compiled
from experts.errors import PlacementImpossible
from experts.messages import Homes
from experts.placement_layer import Rooms
from experts.placement_search import fresh_homes, nearest_homes

SPEED_MAX = 1000.0


@dataclass(frozen=True, slots=True)
class ShardRoom:
    """Where replicas can go: `slots_count` experts of each layer, at a `speed` relative to other shards."""

    host: str
    slots_count: int
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Homes of all experts, and what they are worth; times are of the slowest shard, over the mean shard's.

    `time_bounds` are what no placement can go below: the mean, and the heaviest expert's share after the best
    possible replication (with the lightest others beside it where no slot is spare).
    """

    homes: Homes
    times: tuple[float, ...]  # by layer
    time_bounds: tuple[float, ...]  # by layer
    moves_counts: tuple[int, ...]  # by layer, replicas where there was none of their expert before
    replicas_count: int
    least_replicas_count: int  # every expert of every layer has so many, on different shards
    least_hosts_count: int  # and they are on so many different hosts
    crowded_count: int  # replicas beside another of their expert while some host has none
    groups_kept_count: int  # groups, over all layers, with a home for each of their experts on one host


def solve_placement(
    load: np.ndarray | Sequence[Sequence[float]],
    rooms: Sequence[ShardRoom],
    current: Homes | None = None,
    replicas_min: int = 1,
    groups_count: int = 1,
    slack: float = 0.02,
    tries_max: int = 8,
) -> Plan:
    """The plan for `load` [layers, experts] in tokens; the same input gives the same plan on any machine.

    `current` are the homes in force as indices into `rooms`, without shards that have gone (an expert may be
    left with none): few replicas move, while the slowest shard keeps within `slack` of a fresh plan's. Groups
    of neighbours keep to a host at the same price. Where the bound is not met, up to `tries_max` other counts
    of replicas are packed for each layer. Raises PlacementImpossible for what no plan can answer.
    """
    tokens = _checked_load(load)
    layers_count, experts_count = tokens.shape
    if not 1 <= groups_count <= experts_count or experts_count % groups_count:
        raise PlacementImpossible(
            f"groups_count {groups_count} does not divide {experts_count} experts: use the model's n_group"
        )
    if not 0 <= slack < np.inf:
        raise PlacementImpossible(
            f"slack {slack} is not a number from 0 up: 0.02 lets 2 % of speed go for rest"
        )
    _check_rooms(rooms, experts_count, replicas_min)
    tables = _tables_of(rooms, experts_count)
    there = _matrix_of(current, layers_count, experts_count, len(rooms))
    units = _in_mean_shards(tokens, rooms)
    homes, times, bounds = fresh_homes(units, tables, replicas_min, groups_count, slack, tries_max)
    if current is not None:
        enough = times * (1 + slack)
        homes = nearest_homes(units, tables, replicas_min, groups_count, there, homes, enough)
    return _plan_of(homes, there, units, bounds, tables, groups_count)


def warm_up() -> None:
    """Compile the search (seconds, the first time on a machine; later it is read from a cache)."""
    rooms = [ShardRoom("a", 2), ShardRoom("b", 2)]
    solve_placement([[3.0, 2.0, 1.0]], rooms, solve_placement([[1.0, 2.0, 3.0]], rooms).homes)
    mark_compiled()


def _checked_load(load: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """As float64 [layers, experts], at least one of each, none negative."""
    try:
        tokens = np.asarray(load, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PlacementImpossible(f"load is not a table of numbers [layers, experts]: {error}") from error
    if tokens.ndim != 2 or not tokens.size:
        raise PlacementImpossible(
            f"load has shape {tokens.shape}: it must be [layers, experts], at least one each"
        )
    wrong = np.argwhere(~((tokens >= 0) & (tokens < np.inf)))
    if len(wrong):
        layer, expert = wrong[0]
        raise PlacementImpossible(
            f"load of layer {layer}, expert {expert} is {tokens[layer, expert]}: it must be finite, 0 or more"
        )
    return tokens


def _check_rooms(rooms: Sequence[ShardRoom], experts_count: int, replicas_min: int) -> None:
    """Slots for `replicas_min` of each expert on different shards; if the sum suffices, it can be done."""
    if replicas_min < 1:
        raise PlacementImpossible(f"replicas_min {replicas_min} leaves experts without a home: set 1 or more")
    for index, room in enumerate(rooms):
        if room.slots_count < 1 or not 1 / SPEED_MAX <= room.speed <= SPEED_MAX:
            raise PlacementImpossible(
                f"shard {index} has {room.slots_count} slots and speed {room.speed}: slots must be 1 or more"
                f" (leave a shard without any out), speed {1 / SPEED_MAX} to {SPEED_MAX}"
            )
    if len(rooms) < replicas_min:
        raise PlacementImpossible(
            f"{len(rooms)} shards for replicas_min {replicas_min}, each on a shard of its own:"
            f" add {replicas_min - len(rooms)} shards or lower replicas_min"
        )
    usable = [min(room.slots_count, experts_count) for room in rooms]
    needed = experts_count * replicas_min
    if sum(usable) < needed:
        raise PlacementImpossible(
            f"{sum(usable)} slots for {experts_count} experts times replicas_min {replicas_min}:"
            f" {needed - sum(usable)} too few; add shards or slots, or lower replicas_min"
        )


def _tables_of(rooms: Sequence[ShardRoom], experts_count: int) -> Rooms:
    """As arrays; hosts numbered as they first come."""
    hosts = {host: index for index, host in enumerate(dict.fromkeys(room.host for room in rooms))}
    slots = [min(room.slots_count, experts_count) for room in rooms]
    return Rooms(
        np.array(slots, dtype=np.int64),
        1.0 / np.array([room.speed for room in rooms], dtype=np.float64),
        np.array([hosts[room.host] for room in rooms], dtype=np.int64),
        len(hosts),
    )


def _in_mean_shards(tokens: np.ndarray, rooms: Sequence[ShardRoom]) -> np.ndarray:
    """Tokens in units of a mean shard's; a layer without any is taken as if its experts were equal."""
    heaviest = tokens.max(axis=1, keepdims=True)
    portions = np.divide(tokens, heaviest, out=np.ones_like(tokens), where=heaviest > 0)
    return portions / portions.sum(axis=1, keepdims=True) * sum(room.speed for room in rooms)


def _matrix_of(current: Homes | None, layers_count: int, experts_count: int, shards_count: int) -> np.ndarray:
    """Homes as bool [layers, experts, shards]."""
    there = np.zeros((layers_count * experts_count, shards_count), dtype=np.bool_)
    if current is not None:
        rows = [homes for layer in current for homes in layer]
        if len(current) != layers_count or any(len(layer) != experts_count for layer in current):
            raise PlacementImpossible(
                f"current has not {layers_count} layers of {experts_count} experts each, as load has"
            )
        shards = np.array([shard for homes in rows for shard in homes], dtype=np.int64)
        if len(shards) and not 0 <= shards.min() <= shards.max() < shards_count:
            raise PlacementImpossible(
                f"current names shards {shards.min()} to {shards.max()}, rooms are 0 to {shards_count - 1}:"
                " leave out shards that have gone and number the others anew"
            )
        there[np.repeat(np.arange(len(rows)), [len(homes) for homes in rows]), shards] = True
    return there.reshape(layers_count, experts_count, shards_count)


def _plan_of(
    held: np.ndarray,
    there: np.ndarray,
    units: np.ndarray,
    bounds: np.ndarray,
    rooms: Rooms,
    groups_count: int,
) -> Plan:
    """Homes as tuples; every figure counted anew from them."""
    layers_count, experts_count, shards_count = held.shape
    row, shard = np.divmod(np.flatnonzero(held), shards_count)  # row: layer and expert
    layer = row // experts_count
    replicas = np.bincount(row, minlength=units.size)
    time = np.bincount(
        layer * shards_count + shard,
        weights=(units.ravel() / replicas)[row] * rooms.cost[shard],
        minlength=layers_count * shards_count,
    )
    is_new = ~there.reshape(-1, shards_count)[row, shard]
    by_host = np.bincount(
        row * rooms.hosts_count + rooms.host[shard], minlength=units.size * rooms.hosts_count
    )
    on_host = by_host.reshape(-1, rooms.hosts_count) > 0
    hosts = on_host.sum(axis=1)
    groups = on_host.reshape(layers_count, groups_count, -1, rooms.hosts_count)
    return Plan(
        homes=_tuples_of(shard, replicas, experts_count),
        times=tuple(time.reshape(layers_count, -1).max(axis=1).tolist()),
        time_bounds=tuple(bounds.tolist()),
        moves_counts=tuple(np.bincount(layer, weights=is_new).astype(int).tolist()),
        replicas_count=len(shard),
        least_replicas_count=int(replicas.min()),
        least_hosts_count=int(hosts.min()),
        crowded_count=int((np.minimum(replicas, rooms.hosts_count) - hosts).sum()),
        groups_kept_count=int(groups.all(axis=2).any(axis=2).sum()),
    )


def _tuples_of(shard: np.ndarray, replicas: np.ndarray, experts_count: int) -> Homes:
    """Shards, expert after expert and layer after layer, cut into tuples; most have one, and share it."""
    alone = [(index,) for index in range(shard.max() + 1)]
    ends = np.cumsum(replicas)
    rows = [alone[index] for index in shard[ends - 1].tolist()]
    for row in np.flatnonzero(replicas > 1).tolist():
        rows[row] = tuple(shard[ends[row] - replicas[row] : ends[row]].tolist())
    return tuple(tuple(rows[begin : begin + experts_count]) for begin in range(0, len(rows), experts_count))
