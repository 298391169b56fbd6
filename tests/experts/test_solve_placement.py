"""Placement: every expert has a home, apart from its siblings, and no shard much more to do than another."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import compiled
from experts.errors import PlacementImpossible
from experts.placement_pack import count_replicas, pack_in_order
from experts.solve_placement import Homes, Plan, ShardRoom, solve_placement

README_LOADS = [  # the example in the README of deepseek-ai/EPLB
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def equal_rooms(shards_count: int, slots_count: int, hosts_count: int = 1) -> list[ShardRoom]:
    """Shards alike, neighbours on one host; the first have one slot more where it does not come out even."""
    more = slots_count % shards_count
    return [
        ShardRoom(f"host-{shard * hosts_count // shards_count}", slots_count // shards_count + (shard < more))
        for shard in range(shards_count)
    ]


def skewed_load(layers_count: int, experts_count: int, seed: int = 1) -> np.ndarray:
    """Lognormal, sigma 1."""
    return np.random.default_rng(seed).lognormal(0, 1, (layers_count, experts_count))


def times_of(homes: Homes, load: np.ndarray, rooms: list[ShardRoom]) -> list[float]:
    """Slowest over mean shard of every layer, counted the slow way."""
    times = []
    for layer, tokens in zip(homes, np.asarray(load, dtype=float), strict=True):
        tokens = tokens / tokens.max() if tokens.any() else np.ones(len(tokens))
        busy = [0.0] * len(rooms)
        for expert, shards in enumerate(layer):
            for shard in shards:
                busy[shard] += tokens[expert] / len(shards) / rooms[shard].speed
        times.append(max(busy) / (tokens.sum() / sum(room.speed for room in rooms)))
    return times


def assert_sound(plan: Plan, load: np.ndarray, rooms: list[ShardRoom], replicas_min: int) -> None:
    """Coverage, capacity, apartness, and figures that tell the truth."""
    load = np.asarray(load)
    assert np.shape(load) == (len(plan.homes), len(plan.homes[0]))
    for layer in plan.homes:
        held = Counter(shard for shards in layer for shard in shards)
        assert all(
            0 <= shard < len(rooms) and count <= rooms[shard].slots_count for shard, count in held.items()
        )
        for shards in layer:
            assert list(shards) == sorted(set(shards)) and len(shards) >= replicas_min
    every = [shards for layer in plan.homes for shards in layer]
    hosts = [len({rooms[shard].host for shard in shards}) for shards in every]
    hosts_count = len({room.host for room in rooms})
    assert plan.least_replicas_count == min(len(shards) for shards in every)
    assert plan.replicas_count == sum(len(shards) for shards in every)
    assert plan.least_hosts_count == min(hosts)
    assert plan.crowded_count == sum(
        min(len(shards), hosts_count) - count for shards, count in zip(every, hosts, strict=True)
    )
    assert plan.times == pytest.approx(times_of(plan.homes, load, rooms))
    assert all(time >= bound * (1 - 1e-9) for time, bound in zip(plan.times, plan.time_bounds, strict=True))


def moves_of(plan: Plan, current: Homes) -> list[int]:
    """Replicas that are new on their shard, by layer."""
    return [
        sum(len(set(new) - set(old)) for new, old in zip(*layers, strict=True))
        for layers in zip(plan.homes, current, strict=True)
    ]


loads = st.one_of(
    st.floats(0, 1e6), st.integers(0, 3).map(float), st.just(0.0), st.floats(0, 1e300), st.just(5e-324)
)


@st.composite
def problems(draw) -> tuple[np.ndarray, list[ShardRoom], int]:
    """Load, rooms on any hosts, and replicas_min: possible ones, some with no slot to spare."""
    layers_count, experts_count = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    replicas_min = draw(st.integers(1, 3))
    shards_count = draw(st.integers(replicas_min, 8))
    slots = draw(st.lists(st.integers(1, 14), min_size=shards_count, max_size=shards_count))
    while sum(min(count, experts_count) for count in slots) < experts_count * replicas_min:
        slots[slots.index(min(slots))] += 1
    hosts = draw(st.lists(st.sampled_from("abcd"), min_size=shards_count, max_size=shards_count))
    speeds = draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 1.0, 3.0)]))
    rooms = [
        ShardRoom(host, count, speeds[index % len(speeds)])
        for index, (host, count) in enumerate(zip(hosts, slots, strict=True))
    ]
    row = st.lists(loads, min_size=experts_count, max_size=experts_count)
    load = draw(st.lists(row, min_size=layers_count, max_size=layers_count))
    return np.array(load), rooms, replicas_min


@given(problem=problems(), divide=st.booleans())
@settings(max_examples=300)
def test_every_possible_problem_has_a_sound_plan_and_always_the_same(problem, divide):
    load, rooms, replicas_min = problem
    groups_count = 2 if divide and load.shape[1] % 2 == 0 else 1
    plan = solve_placement(load, rooms, replicas_min=replicas_min, groups_count=groups_count)
    assert_sound(plan, load, rooms, replicas_min)
    assert plan.moves_counts == tuple(sum(map(len, layer)) for layer in plan.homes)
    assert plan == solve_placement(load, rooms, replicas_min=replicas_min, groups_count=groups_count)


@given(problem=problems(), data=st.data())
@settings(max_examples=300)
def test_any_current_homes_lead_to_a_sound_plan(problem, data):
    """Shards gone, shards new, homes too many for their shard, experts with none: all may come before."""
    load, rooms, replicas_min = problem
    homes = st.sets(st.integers(0, len(rooms) - 1)).map(lambda shards: tuple(sorted(shards)))
    layers_count, experts_count = load.shape
    layer = st.lists(homes, min_size=experts_count, max_size=experts_count).map(tuple)
    current = tuple(data.draw(st.lists(layer, min_size=layers_count, max_size=layers_count)))
    plan = solve_placement(load, rooms, current, replicas_min)
    assert_sound(plan, load, rooms, replicas_min)
    assert list(plan.moves_counts) == moves_of(plan, current)
    fresh = solve_placement(load, rooms, replicas_min=replicas_min)
    pairs = zip(plan.times, fresh.times, strict=True)
    assert all(time <= fresh_time * 1.02 * (1 + 1e-9) for time, fresh_time in pairs)


@given(
    hosts_count=st.integers(2, 4),
    shards_each=st.integers(1, 3),
    slots_each=st.integers(1, 6),
    missing=st.integers(0, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_replicas_sit_on_different_hosts_where_hosts_are_alike(
    hosts_count, shards_each, slots_each, missing, seed
):
    shards_count = hosts_count * shards_each
    experts_count = max(shards_count * slots_each - missing, 1)
    rooms = equal_rooms(shards_count, shards_count * slots_each, hosts_count)
    for replicas_min in (1, 2):
        if sum(min(room.slots_count, experts_count) for room in rooms) >= replicas_min * experts_count:
            plan = solve_placement(skewed_load(2, experts_count, seed), rooms, replicas_min=replicas_min)
            assert plan.crowded_count == 0 and plan.least_hosts_count >= replicas_min


@given(seed=st.integers(0, 99), lost=st.sets(st.integers(0, 7), min_size=1, max_size=2))
@settings(max_examples=30)
def test_a_lost_shard_costs_few_moves_and_no_home(seed, lost):
    load, rooms = skewed_load(2, 32, seed), equal_rooms(8, 48, 4)
    before = solve_placement(load, rooms)
    left = [shard for shard in range(8) if shard not in lost]
    current = tuple(
        tuple(tuple(left.index(shard) for shard in shards if shard in left) for shards in layer)
        for layer in before.homes
    )
    plan = solve_placement(load, [rooms[shard] for shard in left], current)
    assert_sound(plan, load, [rooms[shard] for shard in left], 1)
    survivors = [sum(map(len, layer)) for layer in current]
    stayed = [
        sum(map(len, layer)) - moved for layer, moved in zip(plan.homes, plan.moves_counts, strict=True)
    ]
    assert all(stay >= survive / 2 for stay, survive in zip(stayed, survivors, strict=True))


def test_no_worse_than_the_published_plan_of_the_published_example():
    plan = solve_placement(README_LOADS, equal_rooms(8, 16))
    assert_sound(plan, README_LOADS, equal_rooms(8, 16), 1)
    assert plan.times[0] <= 1.073 and plan.times[1] <= 1.1904


@pytest.mark.parametrize("kind", ["lognormal", 0.3, 0.6, 0.9, 1.2])
@pytest.mark.parametrize("slots_count", [288, 320])
def test_within_a_hundredth_of_the_bound(kind, slots_count):
    rng = np.random.default_rng(2)
    ranks = np.arange(1, 257.0)
    load = (
        rng.lognormal(0, 1, (4, 256))
        if kind == "lognormal"
        else np.stack([rng.permutation(ranks**-kind) for _ in range(4)])
    )
    plan = solve_placement(load, equal_rooms(32, slots_count))
    assert all(time <= 1.01 * bound for time, bound in zip(plan.times, plan.time_bounds, strict=True))


def test_groups_keep_to_a_host_where_that_costs_little():
    load, rooms = np.random.default_rng(3).uniform(1, 2, (4, 256)), equal_rooms(32, 288, 4)
    plan = solve_placement(load, rooms, groups_count=8)
    assert_sound(plan, load, rooms, 1)
    assert plan.groups_kept_count == 4 * 8 and max(plan.times) <= 1.1
    assert solve_placement(load, rooms).groups_kept_count < 4 * 8


def test_little_moves_while_load_drifts():
    rng = np.random.default_rng(4)
    load, rooms = skewed_load(4, 256), equal_rooms(32, 288, 4)
    plan = solve_placement(load, rooms)
    for _ in range(6):
        load = load * rng.lognormal(0, 0.05, load.shape)
        plan, before = solve_placement(load, rooms, plan.homes), plan
        assert list(plan.moves_counts) == moves_of(plan, before.homes)
        assert sum(plan.moves_counts) <= 0.1 * plan.replicas_count
        fresh = solve_placement(load, rooms)
        pairs = zip(plan.times, fresh.times, strict=True)
        assert all(time <= 1.02 * fresh_time * (1 + 1e-9) for time, fresh_time in pairs)
        assert plan.crowded_count == 0


def test_nothing_moves_where_nothing_changed():
    load, rooms = skewed_load(2, 64), equal_rooms(8, 80, 2)
    plan = solve_placement(load, rooms, replicas_min=1, groups_count=4)
    again = solve_placement(load, rooms, plan.homes, groups_count=4)
    assert again.homes == plan.homes and again.moves_counts == (0, 0)


def test_new_shards_are_put_to_use():
    load, rooms = skewed_load(2, 64), equal_rooms(10, 100)
    before = solve_placement(load, rooms[:8])
    plan = solve_placement(load, rooms, before.homes)
    assert all(time <= 1.03 for time in plan.times)
    assert all(0 < moves < 40 for moves in plan.moves_counts)


def test_a_fast_shard_has_more_to_do():
    rooms = [ShardRoom("a", 40, speed=3.0), ShardRoom("a", 20), ShardRoom("a", 20)]
    plan = solve_placement(skewed_load(1, 40), rooms)
    assert plan.times[0] <= 1.01


def test_slots_stay_empty_rather_than_double():
    plan = solve_placement([[5.0, 1.0]], equal_rooms(3, 30))
    assert plan.homes == (((0, 1, 2), (0, 1, 2)),) and plan.times == (1.0,)


def test_a_layer_without_load_is_spread_evenly():
    plan = solve_placement(np.zeros((1, 8)), equal_rooms(4, 8))
    assert plan.times == (1.0,) and plan.time_bounds == (1.0,)
    assert Counter(shard for shards in plan.homes[0] for shard in shards) == {0: 2, 1: 2, 2: 2, 3: 2}


ROOMS = equal_rooms(2, 4)
IMPOSSIBLE = [
    (dict(load=[[1.0, math.nan]]), "layer 0, expert 1 is nan: it must be finite"),
    (dict(load=[[1.0, 2.0], [-1.0, 0.0]]), "layer 1, expert 0 is -1.0: it must be finite"),
    (dict(load=[[math.inf]]), "expert 0 is inf"),
    (dict(load=[1.0, 2.0]), r"shape \(2,\): it must be \[layers, experts\]"),
    (dict(load=[]), "shape"),
    (dict(load=[[]]), "at least one each"),
    (dict(load=[["many"]]), "not a table of numbers"),
    (dict(rooms=[]), "0 shards for replicas_min 1.*add 1 shards"),
    (dict(rooms=[ShardRoom("a", 0), ShardRoom("a", 9)]), "shard 0 has 0 slots"),
    (dict(rooms=[ShardRoom("a", 9, math.nan)]), "speed nan"),
    (dict(rooms=[ShardRoom("a", 9, 0.0)]), "speed 0.0"),
    (
        dict(rooms=[ShardRoom("a", 2), ShardRoom("a", 1)]),
        "3 slots for 4 experts.*1 too few; add shards or slots",
    ),
    (dict(replicas_min=0), "replicas_min 0"),
    (dict(replicas_min=2), "4 slots for 4 experts times replicas_min 2: 4 too few"),
    (dict(replicas_min=3), "2 shards for replicas_min 3.*add 1 shards or lower"),
    (dict(groups_count=3), "groups_count 3 does not divide 4 experts"),
    (dict(groups_count=0), "groups_count 0"),
    (dict(slack=math.nan), "slack nan"),
    (dict(slack=-0.1), "slack -0.1"),
    (dict(current=(((0,), (1,), (0,)),)), "current has not 1 layers of 4 experts"),
    (dict(current=(((0,), (1,), (0,), (2,)),)), "shards 0 to 2, rooms are 0 to 1: leave out"),
]


@pytest.mark.parametrize(("wrong", "reason"), IMPOSSIBLE, ids=lambda value: str(value)[:40])
def test_what_no_plan_can_answer_is_refused_with_a_reason(wrong, reason):
    with pytest.raises(PlacementImpossible, match=reason):
        solve_placement(**({"load": [[4.0, 3.0, 2.0, 1.0]], "rooms": ROOMS} | wrong))


def test_machine_code_lies_where_it_is_looked_for_and_how_it_was_asked_for_is_part_of_its_name():
    assert Path(compiled.__file__) in compiled.SOURCES
    assert all(compiled.KEPT in Path(one.stats.cache_path).parents for one in (count_replicas, pack_in_order))
