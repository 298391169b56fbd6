"""Experts move in steps of which each leaves every expert a home, when it pays, and back when it did not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.balance import balance_of, shard_loads
from experts.config import PlanConfig
from experts.errors import ExpertsMoving
from experts.homes import (
    check_homes,
    homes_among,
    homes_fewest_count,
    loads_between,
    steps_between,
    with_homes,
)
from experts.load import RecentLoad
from experts.messages import Homes, Placement, ShardAddress
from experts.placement import even_homes
from experts.plan import Planner
from experts.rebalance import (
    SLOTS_MIN,
    Rebalance,
    RebalanceConfig,
)

EXPERT_BYTES = 10
FIRST_LAYER = 1


def addresses(names: str) -> tuple[ShardAddress, ...]:
    """Shards by letters."""
    return tuple(ShardAddress(name, f"memory://{name}", f"host-{name}") for name in names)


class Group:
    """Shards and nodes that do what a rebalance asks, one beat after the other."""

    def __init__(self, names: str = "ab", layers_count: int = 2, experts_count: int = 8, **config):
        slots_max = config.pop("slots_max", 1 << 20)
        plan = PlanConfig(config.pop("replicas_min", 1), config.pop("spare_replicas", 0), slots_max)
        planner = Planner(plan, layers_count, experts_count, 1)
        planner.is_ready = True
        load = RecentLoad(layers_count, experts_count, 60.0, 5.0)
        self.rebalance = Rebalance(RebalanceConfig(**config), load, EXPERT_BYTES, planner)
        self.totals = {name: np.zeros((layers_count, experts_count), np.int64) for name in "abcdefghij"}
        self.epochs: dict[str, int] = {}
        self.nodes_epoch = 0
        self.loaded_max = 0  # replicas that a shard had to load in one step
        self.deaf: set[str] = set()
        self.full: set[str] = set()  # they load nothing that they do not hold
        self.held: dict[str, set[tuple[int, int]]] = {}
        self.now_s = 0.0
        homes = (even_homes(len(names), experts_count),) * layers_count
        self.rebalance.begin(Placement(1, FIRST_LAYER, addresses(names), homes), self.now_s)
        self.turn()

    def turn(self, turns_count: int = 1, tokens: np.ndarray | None = None) -> None:
        """Half seconds in which nodes send `tokens` [layers, experts] and everybody follows."""
        for _ in range(turns_count):
            self.now_s += 0.5
            before = self.rebalance.placement
            for shard in before.shards:
                wanted = set(before.experts_of(shard.name))
                is_full = shard.name in self.full and not wanted <= self.held.get(shard.name, set())
                if shard.name not in self.deaf and not is_full:
                    self.epochs[shard.name], self.held[shard.name] = before.epoch, wanted
            if tokens is not None:
                self._compute(tokens)
            self.rebalance.advance(self.epochs, self.nodes_epoch, self.now_s)
            if self.rebalance.in_force is not None:
                self.nodes_epoch = self.rebalance.in_force.epoch
            self._check(before, self.rebalance.placement)

    def _compute(self, tokens: np.ndarray) -> None:
        placement = self.rebalance.in_force
        for layer, homes in enumerate(placement.homes):
            for expert, home in enumerate(homes):
                for shard in home:
                    name = placement.shards[shard].name
                    self.totals[name][layer, expert] += tokens[layer, expert] // len(home)
        for shard in placement.shards:
            self.rebalance.observe(
                shard.name, tuple(map(tuple, self.totals[shard.name].tolist())), self.now_s
            )

    def _check(self, before: Placement, after: Placement) -> None:
        assert after.epoch >= before.epoch
        assert (after.epoch == before.epoch) == (after is before), "another table has another epoch"
        check_homes(after.homes, after)
        if after.shards == before.shards:
            loads = loads_between(before.homes, after.homes).values()
            self.loaded_max = max(self.loaded_max, *loads, 0)

    @property
    def slowness(self) -> float:
        """Of what is in force, under the load of late."""
        placement = self.rebalance.in_force
        loads = shard_loads(self.rebalance.load.shares(), placement.homes, len(placement.shards))
        return balance_of(loads).slowness


SKEWED = np.array([[400, 400, 400, 400, 10, 10, 10, 10]] * 2)  # all hot experts on the first of two shards


def test_an_uneven_load_moves_experts_and_then_is_even():
    group = Group(pause_s=5.0)
    group.turn(2, SKEWED)
    assert group.slowness > 1.9
    group.turn(40, SKEWED)
    assert group.slowness < 1.01
    assert group.rebalance.rebalances_count == 1 and group.rebalance.rollbacks_count == 0
    assert not group.rebalance.is_moving


def test_an_even_load_moves_nothing():
    group = Group(pause_s=1.0)
    group.turn(40, np.full((2, 8), 100))
    assert group.rebalance.rebalances_count == 0 and group.rebalance.placement.epoch == 1


def test_what_little_load_tells_is_not_acted_upon():
    group = Group(pause_s=1.0)
    group.turn(10, SKEWED // 400)
    assert group.rebalance.load.slots_count < SLOTS_MIN and group.rebalance.rebalances_count == 0


def test_a_small_gain_is_not_worth_the_moves():
    uneven = Group(pause_s=1.0, slowness_max=1.0, gain_min=0.5)
    uneven.turn(20, np.array([[110, 110, 110, 110, 90, 90, 90, 90]] * 2))
    assert uneven.rebalance.rebalances_count == 0


def test_steps_keep_to_their_bytes():
    group = Group(pause_s=1.0, step_bytes_max=EXPERT_BYTES)
    group.turn(40, SKEWED)
    assert group.slowness < 1.01 and group.loaded_max == 1


def test_a_rebalance_that_does_not_gain_what_it_promised_is_rolled_back():
    group = Group(pause_s=5.0)
    before = group.rebalance.in_force.homes
    group.turn(1, SKEWED)
    while group.rebalance.rebalances_count == 0 or group.rebalance.is_moving:
        group.turn(1, SKEWED)
    moved = group.rebalance.in_force.homes
    assert moved != before
    hot = np.array([[expert_homes == (0,) for expert_homes in layer] for layer in moved])
    group.turn(12, np.where(hot, 400, 10))  # the load turns just then, so that the new homes are the worst
    assert group.rebalance.rollbacks_count == 1
    assert group.rebalance.in_force.homes == before


def test_a_shard_that_does_not_load_raises_the_alarm_and_blocks_nothing():
    group = Group(pause_s=5.0, stall_s=10.0)
    before = group.rebalance.in_force.homes
    group.deaf = {"b"}
    group.turn(16, SKEWED)
    assert group.rebalance.in_force.homes == before, "what works stays in force"
    group.turn(24, SKEWED)
    assert group.rebalance.is_stalled and group.rebalance.stalls_count == 1
    group.deaf = set()
    group.turn(1, SKEWED)
    assert not group.rebalance.is_stalled and group.rebalance.in_force.homes == before


def test_a_new_shard_gets_its_share():
    group = Group("ab", spare_replicas=1)
    group.turn(4, SKEWED)
    group.rebalance.go_on_with(addresses("abc"), 0, group.now_s)
    group.turn(6, SKEWED)
    assert len(group.rebalance.in_force.shards) == 3 and group.slowness < 1.2


def test_a_dead_shard_is_first_replaced_where_nothing_else_is():
    group = Group("abc", spare_replicas=1)
    group.turn(4, SKEWED)
    before = group.rebalance.in_force
    group.rebalance.go_on_with(addresses("ac"), 0, group.now_s)
    kept = homes_among(before, addresses("ac"))
    for homes, rest in zip(group.rebalance.placement.homes, kept, strict=True):
        for home, left in zip(homes, rest, strict=True):
            assert home == left if left else len(home) >= 1
    group.turn(6, SKEWED)
    assert [shard.name for shard in group.rebalance.in_force.shards] == ["a", "c"]
    assert group.slowness < 1.2


def test_epochs_go_on_after_the_latest_seen():
    group = Group()
    group.rebalance.go_on_with(addresses("ab"), 41, group.now_s)
    assert group.rebalance.placement.epoch == 42


def test_a_person_may_look_before_and_move_at_will():
    group = Group(pause_s=1e9, step_bytes_max=2 * EXPERT_BYTES)
    group.turn(4, SKEWED)
    forecast = group.rebalance.forecast()
    assert forecast.gain > 0.9 and forecast.slowness_before > 1.9 > 1.01 > forecast.slowness_after
    assert forecast.bytes_count == forecast.moves_count * EXPERT_BYTES == 2 * forecast.fullest_bytes
    assert forecast.steps_count == 2 and forecast.time_s is None
    group.rebalance.move_to(forecast.homes, forecast.epoch, group.now_s)
    with pytest.raises(ExpertsMoving, match="ask again"):
        group.rebalance.move_to(forecast.homes, forecast.epoch, group.now_s)
    group.turn(4, SKEWED)
    assert group.rebalance.in_force.homes == forecast.homes


def test_how_long_a_move_takes_is_learned_from_the_fullest_shard():
    group = Group(pause_s=1e9, step_bytes_max=2 * EXPERT_BYTES)
    group.turn(4, SKEWED)
    first, begin_s = group.rebalance.forecast(), group.now_s
    group.rebalance.move_to(first.homes, first.epoch, begin_s)
    while group.rebalance.is_moving:
        group.turn(1, SKEWED)
    took_s = group.now_s - begin_s
    group.turn(40, SKEWED[:, [0, 4, 5, 1, 6, 2, 3, 7]] * 100)
    then = group.rebalance.forecast()
    assert then.moves_count and then.bytes_count > then.fullest_bytes
    assert then.time_s == pytest.approx(took_s * then.fullest_bytes / first.fullest_bytes)


def test_nothing_is_learned_from_a_move_for_which_nothing_is_loaded():
    group = Group(pause_s=1e9)
    group.turn(4, SKEWED)
    wanted = tuple(((0, 1), *layer[1:]) for layer in group.rebalance.in_force.homes)
    rates = []
    for homes in (wanted, group.rebalance.in_force.homes):
        group.rebalance.move_to(homes, group.rebalance.in_force.epoch, group.now_s)
        group.turn(8, SKEWED)
        assert group.rebalance.in_force.homes == homes
        rates.append(group.rebalance._bytes_per_s)
    assert rates[0] == rates[1] > 0


def test_worse_homes_that_a_person_wants_stay():
    """Nothing was promised, so that nothing was broken."""
    group = Group(pause_s=5.0, slowness_max=np.inf)
    even = np.full((2, 8), 100)
    group.turn(4, even)
    wanted = tuple(((0,), *layer[1:-1], (0,)) for layer in group.rebalance.in_force.homes)
    assert group.rebalance.move_to(wanted, 1, group.now_s).gain < 0
    group.turn(60, even)
    assert group.rebalance.in_force.homes == wanted and group.rebalance.rollbacks_count == 0


def test_the_report_is_of_what_is_in_force():
    group = Group()
    group.turn(3, SKEWED)
    report = group.rebalance.report()
    assert report.placement is group.rebalance.in_force and not report.is_moving
    assert np.allclose(np.sum(report.shard_loads, axis=1), 1.0) and np.shape(report.expert_loads) == (2, 8)
    assert report.balance.mean_over_max == pytest.approx(1 / group.slowness)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda homes: homes[:1], id="a layer is missing"),
        pytest.param(lambda homes: (homes[0][:-1], homes[1]), id="an expert is missing"),
        pytest.param(lambda homes: (((), *homes[0][1:]), homes[1]), id="no home"),
        pytest.param(lambda homes: (((0, 0), *homes[0][1:]), homes[1]), id="twice"),
        pytest.param(lambda homes: (((2,), *homes[0][1:]), homes[1]), id="no such shard"),
        pytest.param(lambda homes: (((-1,), *homes[0][1:]), homes[1]), id="below zero"),
    ],
)
def test_homes_that_do_not_fit_are_refused(wrong):
    group = Group()
    with pytest.raises(ValueError):
        group.rebalance.move_to(wrong(group.rebalance.in_force.homes), 1, group.now_s)


def homes_of(shards_count: int, layers_count: int, experts_count: int) -> st.SearchStrategy[Homes]:
    """Any homes on some shards."""
    home = st.sets(st.integers(0, shards_count - 1), min_size=1).map(lambda some: tuple(sorted(some)))
    layer = st.lists(home, min_size=experts_count, max_size=experts_count).map(tuple)
    return st.lists(layer, min_size=layers_count, max_size=layers_count).map(tuple)


@given(st.data(), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 60))
def test_on_any_way_every_expert_has_a_home_and_no_step_loads_too_much(
    data, shards_count, layers_count, experts_count, bytes_max
):
    before = data.draw(homes_of(shards_count, layers_count, experts_count))
    after = data.draw(homes_of(shards_count, layers_count, experts_count))
    steps = list(steps_between(before, after, EXPERT_BYTES, bytes_max))
    assert (steps[-1] if steps else before) == after
    here = before
    for step in steps:
        loaded = loads_between(here, step)
        changed = sum(
            old != new for a, b in zip(here, step, strict=True) for old, new in zip(a, b, strict=True)
        )
        assert changed, "no step is for nothing"
        assert all(count == 1 or count * EXPERT_BYTES <= bytes_max for count in loaded.values())
        for homes, old, new in zip(step, before, after, strict=True):
            assert all(home in (was, will) for home, was, will in zip(homes, old, new, strict=True))
        here = step


def test_shards_load_side_by_side():
    """A step is as long for two hundred shards as for two."""
    count = 200
    before = (tuple((shard,) for shard in range(count)),)
    after = (tuple(((shard + 1) % count,) for shard in range(count)),)
    assert list(steps_between(before, after, EXPERT_BYTES, EXPERT_BYTES)) == [after]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_happens_no_expert_is_ever_without_a_home(data):
    """Loads, deaths, births, deafness and wishes at random: `Group` checks each table that is given out."""
    group = Group("abc", 1, 6, pause_s=2.0, stall_s=4.0, step_bytes_max=2 * EXPERT_BYTES, spare_replicas=2)
    for _ in range(12):
        match data.draw(st.sampled_from(["load", "shards", "deaf", "wish"])):
            case "load":
                tokens = data.draw(st.lists(st.integers(0, 2000), min_size=6, max_size=6))
                group.turn(3, np.array([tokens]))
            case "shards":
                names = data.draw(st.sets(st.sampled_from("abcdefgh"), min_size=1))
                seen_epoch = data.draw(st.integers(0, 50))
                group.rebalance.go_on_with(addresses("".join(sorted(names))), seen_epoch, group.now_s)
            case "deaf":
                group.deaf = data.draw(st.sets(st.sampled_from("abcdefgh"), max_size=2))
            case "wish":
                if not group.rebalance.is_moving:
                    shards_count = len(group.rebalance.in_force.shards)
                    epoch = group.rebalance.in_force.epoch
                    group.rebalance.move_to(data.draw(homes_of(shards_count, 1, 6)), epoch, group.now_s)
        group.turn(data.draw(st.integers(0, 4)))
    group.deaf = set()
    group.turn(60)  # what a person wished, the load may undo after a pause
    assert not group.rebalance.is_moving and not group.rebalance.is_stalled


def test_fewest_homes_are_counted_on_those_that_stay():
    placement = Placement(1, 0, addresses("abc"), (((0, 2), (1, 2), (0, 1, 2)),))
    counts = [homes_fewest_count(placement, names) for names in ({"a", "b", "c"}, {"a", "c", "d"}, {"a"})]
    assert counts == [2, 1, 0]
    assert homes_fewest_count(Placement(1, 0, (), ()), {"a", "b"}) == 2


def test_homes_are_followed_by_name():
    placement = Placement(1, 0, addresses("abc"), (((0,), (1, 2), (2,)),))
    assert homes_among(placement, addresses("cb")) == (((), (0, 1), (0,)),)
    assert with_homes((((), (0, 1), (0,)),), (((1,), (0,), (1,)),)) == (((1,), (0, 1), (0,)),)
    assert replace(placement, epoch=2) != placement


def test_a_newcomer_that_never_loads_is_told_of():
    group = Group("ab", stall_s=5.0)
    group.deaf = {"c"}
    group.rebalance.go_on_with(addresses("abc"), 0, group.now_s)
    group.turn(12)
    assert group.rebalance.laggards == {"c"} and group.rebalance.is_stalled
    group.rebalance.go_on_with(addresses("ab"), 0, group.now_s)
    group.turn(2)
    assert [shard.name for shard in group.rebalance.in_force.shards] == ["a", "b"]
    assert not group.rebalance.is_stalled


def test_a_newcomer_that_took_nothing_and_then_cannot_load_serves_nobody():
    group = Group("ab", stall_s=5.0)
    group.full = {"c"}
    group.rebalance.go_on_with(addresses("abc"), 0, group.now_s)
    group.turn(20, SKEWED)
    assert "c" in [shard.name for shard in group.rebalance.in_force.shards], "it took the empty beginning"
    group.rebalance.go_on_with(addresses("ac"), 0, group.now_s)
    group.turn(20)
    assert group.rebalance.laggards == {"c"} and group.rebalance.stalls_count == 2
    assert group.rebalance._serving() == {"a"}, "what had no home is served without waiting for a newcomer"
    epochs = group.epochs | {name: epoch for name, (epoch, _) in group.rebalance._late.items()}
    group.rebalance.advance(epochs, group.nodes_epoch, group.now_s)
    assert not group.rebalance.laggards, "it has loaded what it was late for"


def test_what_a_full_shard_cannot_take_over_goes_to_another():
    group = Group("abc", stall_s=5.0)
    group.full = {"b"}
    before = group.rebalance.in_force
    group.rebalance.go_on_with(addresses("ab"), 0, group.now_s)
    assert group.rebalance.placement.experts_of("b") != before.experts_of("b"), "else nothing is asked of it"
    group.turn(20)
    in_force = group.rebalance.in_force
    assert in_force.experts_of("b") == before.experts_of("b") and not group.rebalance.is_stalled
    assert set(in_force.experts_of("a")) >= set(before.experts_of("c")) and not group.rebalance.laggards


@pytest.mark.parametrize(("slots_max", "spare_replicas"), [(7, 0), (9, 0), (9, 30)])
def test_after_a_death_and_a_failure_to_load_nobody_holds_more_than_there_is_room_for(
    slots_max, spare_replicas
):
    """The able shards alone have too little room for all experts, or just enough to shift them about."""
    names = "abcdefghij"
    group = Group(names, 2, 60, stall_s=5.0, slots_max=slots_max, spare_replicas=spare_replicas)
    tokens = np.array([range(0, 1200, 20)] * 2) ** 2
    group.turn(80, tokens)
    before = group.rebalance.in_force
    assert group.rebalance.rebalances_count and not group.rebalance.is_moving
    group.full = {"b"}
    group.rebalance.go_on_with(addresses(names.replace("a", "")), 0, group.now_s)
    homes = tuple(tuple(sorted({0, *home})) for home in group.rebalance.placement.homes[0])
    group.rebalance.placement = replace(group.rebalance.placement, homes=(homes, homes))  # much is asked of b
    group.turn(14, tokens[:, ::-1] * 100)  # by which a plan would move much
    in_force = group.rebalance.in_force
    assert len(in_force.shards) == 9 and in_force.experts_of("b") == before.experts_of("b")
    held = [Counter(shard for home in layer for shard in home) for layer in in_force.homes]
    assert max(max(layer.values()) for layer in held) <= slots_max


def test_who_gets_on_is_slow_and_who_fails_at_the_same_place_is_stuck():
    group = Group("ab", stall_s=5.0)
    group.deaf = {"c", "d"}
    group.rebalance.go_on_with(addresses("abcd"), 0, group.now_s)
    for turn in range(40):
        group.rebalance.get_on("c", 0, turn / 40, group.now_s)
        group.rebalance.get_on("d", 0, turn % 4 / 4, group.now_s)
        group.turn()
    assert group.rebalance.laggards == {"d"}
    group.rebalance.leave("d")
    assert not group.rebalance.laggards


def test_little_even_traffic_on_many_experts_moves_nothing():
    """Some tokens a second on 64 experts and 8 shards look uneven by chance alone."""
    group = Group("abcdefgh", 6, 64, pause_s=10.0)
    chance = np.random.default_rng(5)
    for _ in range(600):
        tokens = chance.multinomial(8, np.full(64, 1 / 64), size=6)
        group.turn(1, tokens)
    assert group.rebalance.rebalances_count <= 1


def test_after_a_rollback_the_next_try_comes_later():
    group = Group(pause_s=5.0)
    group.turn(1, SKEWED)
    while group.rebalance.rebalances_count == 0 or group.rebalance.is_moving:
        group.turn(1, SKEWED)
    hot = np.array([[home == (0,) for home in layer] for layer in group.rebalance.in_force.homes])
    group.turn(12, np.where(hot, 400, 10))
    assert group.rebalance.rollbacks_count == 1 and group.rebalance._pause_s == 10.0


def test_a_plan_from_another_placement_is_refused():
    group = Group()
    with pytest.raises(ValueError, match="placement 7, but 1 is in force"):
        group.rebalance.move_to(group.rebalance.in_force.homes, 7, group.now_s)
