"""When pools grow and shrink, what a person's word is worth, and that nothing happens without a reason."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaler import DASHBOARD, STUCK_S, Autoscaler
from cluster.config import ClusterConfig
from cluster.errors import InvalidConfig, InvalidRequest
from cluster.place import autoscaler_config
from cluster.pressure import pressures
from cluster.scaled_pool import OBEYED_S
from cluster.scaling import AutoscalerConfig, ChangeRole, PoolLimits, PoolReading, ScalePool

POOLS = (
    PoolLimits("gateway", 1, 1, 1024),
    PoolLimits("prefill", 2, 1, 8),
    PoolLimits("decode", 2, 1, 8),
    PoolLimits("experts", 2, 1, 8),
)
CONFIG = AutoscalerConfig(POOLS, grow_pause_s=10, shrink_pause_s=60)


def autoscaler(**changes: object) -> Autoscaler:
    return Autoscaler(replace(CONFIG, **changes))


def decode(count: int = 2, pages: int = 50, now_s: float = 0.0, **numbers: object) -> PoolReading:
    """A decode pool of nodes with 100 pages each, of which `pages` of each are leased."""
    taken, total = count * pages, count * 100
    values = {"pages_total_count": total, "pages_leased_count": taken, "target_count": count} | numbers
    return PoolReading("decode", now_s, ready_count=values.pop("ready_count", count), **values)


def prefill(count: int = 2, busy: float | None = 0.7, now_s: float = 0.0, **numbers: object) -> PoolReading:
    values = {
        "target_count": count,
        "ready_count": count,
        "tokens_per_s": 1000.0,
        "busy_share": busy,
    } | numbers
    return PoolReading("prefill", now_s, **values)


def experts(count: int = 2, busy: float | None = 0.7, now_s: float = 0.0, **numbers: object) -> PoolReading:
    return PoolReading("experts", now_s, count, count, busy_share=busy, **numbers)


# to grow

GROWTH = [
    ("pages, in proportion", decode(pages=85), 3, "85 % of pages are taken or awaited, above 80 %"),
    ("at most doubled", decode(pages=100, pages_awaited_count=500), 4, "350 %"),
    ("awaited pages", decode(pages=70, pages_awaited_count=30), 3, "85 %"),
    ("requests", decode(requests_count=10, requests_max_count=10), 3, "10 requests on places for 10"),
    ("latency", decode(inter_token_s=0.2, requests_count=9), 3, "inter-token latency of 9 in 10"),
    ("latency, each alone", decode(inter_token_s=0.2, requests_count=2), None, ""),
    ("queue", prefill(tokens_waiting_count=3000, requests_count=9), 3, "3,000 prompt tokens wait, 1.5 s"),
    ("queue, each alone", prefill(tokens_waiting_count=9000, requests_count=2), None, ""),
    (
        "queue, speed unknown",
        prefill(tokens_waiting_count=9000, requests_count=9, tokens_per_s=None),
        None,
        "",
    ),
    ("first token", prefill(time_to_first_token_s=2.1, requests_count=9), 3, "time to first token"),
    ("busy", prefill(busy=0.9), 3, "nodes compute 90 % of the time, above 85 %"),
    ("busy shard", experts(busy=1.0), 3, "the busiest shard computes 100 %"),
    ("imbalance", experts(slowness=1.6), 3, "layers take 60 % longer"),
    ("imbalance, idle", experts(busy=0.2, slowness=1.6), None, ""),
    ("experts unknown", experts(busy=None, slowness=9.0), None, ""),
    ("nothing ready", decode(pages=0, ready_count=0, pages_total_count=0), None, ""),
]


@pytest.mark.parametrize(
    ("reading", "count", "words"), [case[1:] for case in GROWTH], ids=[c[0] for c in GROWTH]
)
def test_what_hurts_makes_a_pool_grow(reading: PoolReading, count: int | None, words: str):
    commands = autoscaler().decide([reading], 0.0)
    if count is None:
        assert commands == []
    else:
        [command] = commands
        assert (command.kind, command.count) == (reading.kind, count)
        assert words in command.reason


def test_a_pool_grows_to_its_most_and_no_further():
    one = autoscaler()
    [command] = one.decide([decode(6, pages=160)], 0.0)
    assert command.count == 8
    assert one.decide([decode(8, pages=160, now_s=1.0)], 1.0) == []
    assert one.decide([decode(8, pages=160, now_s=20.0)], 20.0) == []
    assert state(one, "decode").outlook == "at its most"


def test_after_growth_there_is_a_rest():
    one = autoscaler()
    assert one.decide([decode(pages=90)], 0.0)
    assert one.decide([decode(3, pages=90, now_s=5.0)], 5.0) == []
    assert one.decide([decode(3, pages=90, now_s=11.0)], 11.0)


def test_while_nodes_start_only_greater_pressure_asks_for_more():
    one = autoscaler()
    assert one.decide([decode(pages=100)], 0.0)
    starting = {"target_count": 3, "starting_count": 1}
    assert one.decide([decode(2, pages=122, now_s=11.0, **starting)], 11.0) == []  # hardly more than before
    [command] = one.decide([decode(2, pages=145, now_s=12.0, **starting)], 12.0)
    assert command.count == 4


def test_nothing_is_asked_for_twice_before_serve_shows_it():
    one = autoscaler(grow_pause_s=0.0)
    assert one.decide([decode(pages=90)], 0.0)
    assert one.decide([decode(pages=200, now_s=1.0)], 1.0) == []
    assert one.decide([decode(pages=90, now_s=OBEYED_S + 1)], OBEYED_S + 1) != []  # the call was lost


@pytest.mark.parametrize("age_s", [6.0, 1000.0])
def test_a_stale_reading_moves_nothing(age_s: float):
    one = autoscaler()
    assert one.decide([decode(pages=200)], age_s) == []
    assert one.decide([], age_s) == []
    assert "nothing was heard" in state(one, "decode", age_s).outlook


def test_switched_off_it_only_watches():
    one = autoscaler(is_enabled=False)
    assert one.decide([decode(pages=200)], 0.0) == []
    assert one.report(0.0).is_enabled is False
    assert state(one, "decode").pressures[0].level > 1


def test_gateways_and_pools_of_nothing_are_left_alone():
    one = autoscaler()
    readings = [
        PoolReading("gateway", 0.0, 1, 1),
        prefill(0, busy=1.0),
        PoolReading("coordinator", 0.0, 1, 1),
    ]
    assert one.decide(readings, 0.0) == []


# to shrink


def run(
    one: Autoscaler, reading: Callable[[int, float], PoolReading], count: int, begin_s: float, end_s: float
) -> list[tuple[float, int]]:
    """Look each second and obey at once: the changes, with their time."""
    changes = []
    now_s = begin_s
    while now_s < end_s:
        for command in one.decide([reading(count, now_s)], now_s):
            count = command.count
            changes.append((now_s, count))
        now_s += 1.0
    return changes


def test_an_idle_pool_shrinks_one_at_a_time_to_its_fewest():
    changes = run(autoscaler(), lambda count, now_s: decode(count, pages=1, now_s=now_s), 4, 0.0, 400.0)
    assert [count for _, count in changes] == [3, 2, 1]
    times = [0.0, *(time_s for time_s, _ in changes)]
    assert all(later - earlier >= 60 for earlier, later in pairwise(times))


def test_a_break_in_being_too_large_begins_the_wait_anew():
    def reading(count: int, now_s: float) -> PoolReading:
        return decode(count, pages=60 if now_s % 50 == 0 else 1, now_s=now_s)

    assert run(autoscaler(), reading, 4, 0.0, 600.0) == []


def test_what_remains_must_stay_well_below_the_limit():
    stays = run(autoscaler(), lambda count, now_s: decode(count, 120 // count, now_s), 2, 0.0, 600.0)
    shrinks = run(autoscaler(), lambda count, now_s: decode(count, 100 // count, now_s), 2, 0.0, 600.0)
    assert stays == []  # one node would be 120 % full
    assert shrinks == []  # or 100 %
    assert run(autoscaler(), lambda count, now_s: decode(count, 50 // count, now_s), 2, 0.0, 600.0)


@pytest.mark.parametrize("numbers", [{"is_complete": False}, {"starting_count": 1}, {"draining_count": 1}])
def test_a_pool_does_not_shrink_while_something_is_unknown_or_under_way(numbers: dict):
    def reading(count: int, now_s: float) -> PoolReading:
        return decode(count, pages=1, now_s=now_s, **numbers)

    assert run(autoscaler(), reading, 4, 0.0, STUCK_S) == []


def test_nodes_that_never_start_do_not_keep_a_pool_large():
    def reading(count: int, now_s: float) -> PoolReading:
        return decode(2, pages=1, now_s=now_s, target_count=count, starting_count=max(count - 2, 0))

    changes = run(autoscaler(), reading, 4, 0.0, STUCK_S + 200)
    assert changes and changes[0][0] > STUCK_S


def test_a_shrinking_that_was_regretted_makes_the_next_wait_longer():
    one, load = autoscaler(), 50
    run(one, lambda count, now_s: decode(count, load // count, now_s), 2, 0.0, 70.0)
    load = 90
    assert run(one, lambda count, now_s: decode(count, load // count, now_s), 1, 70.0, 80.0)
    load = 50
    [(shrunk_s, _)] = run(one, lambda count, now_s: decode(count, load // count, now_s), 2, 80.0, 300.0)
    assert shrunk_s >= 80 + 120


def test_a_pool_outside_its_bounds_comes_back_at_once():
    [command] = autoscaler().decide([decode(12, pages=70)], 0.0)
    assert (command.count, command.reason) == (8, "8 are the most allowed")
    pools = (PoolLimits("decode", 1, 2, 8),)
    [command] = autoscaler(pools=pools).decide([decode(1, pages=70)], 0.0)
    assert (command.count, command.reason) == (2, "2 are the fewest allowed")


# what a person says


def state(one: Autoscaler, kind: str, now_s: float = 0.0):
    return next(pool for pool in one.report(now_s).pools if pool.kind == kind)


def test_a_held_pool_stays_until_released():
    one = autoscaler()
    one.decide([decode(pages=50)], 0.0)
    assert one.hold("decode", 3, "the Pools page", 1.0) == 3
    assert one.decide([decode(3, pages=200, now_s=2.0)], 2.0) == []
    assert run(one, lambda count, now_s: decode(count, 1, now_s), 3, 3.0, 300.0) == []
    assert state(one, "decode").hold.by == "the Pools page"
    one.release("decode", 300.0)
    assert state(one, "decode").hold is None
    assert run(one, lambda count, now_s: decode(count, 1, now_s), 3, 301.0, 380.0)[0][1] == 2


def test_a_hold_without_a_count_keeps_what_there_is():
    one = autoscaler()
    one.decide([decode(5)], 0.0)
    assert one.hold("decode", None, "somebody", 0.0) == 5


def test_a_count_that_nobody_here_asked_for_was_set_by_a_person():
    one = autoscaler()
    one.target_seen("decode", 2, 0.0)
    one.target_seen("decode", 4, 1.0)
    assert (state(one, "decode").hold.count, state(one, "decode").hold.by) == (4, DASHBOARD)
    one.target_seen("decode", 5, 2.0)
    assert state(one, "decode").hold.count == 5
    one.hold("gateway", 2, "somebody", 3.0)
    assert state(one, "gateway").hold.count == 2


def targets(now_s: float, **counts: int) -> list[PoolReading]:
    """What Serve aims at, and has."""
    return [PoolReading(kind, now_s, count, count) for kind, count in counts.items()]


def test_a_configuration_that_is_deployed_anew_holds_no_pool():
    one = autoscaler(is_enabled=False)
    for now_s, counts in enumerate(({"gateway": 3, "decode": 5}, {"gateway": 1, "decode": 2})):
        assert one.decide(targets(now_s, prefill=2, experts=2, **counts), now_s) == []
    assert one.holds == () and state(one, "decode").target_count == 2
    assert "deployed anew" in state(one, "decode").last_reason
    one.hold("decode", 5, "somebody", 2.0)
    one.decide(targets(3, gateway=1, prefill=2, experts=2, decode=5), 3.0)
    one.decide(targets(4, gateway=4, prefill=2, experts=2, decode=5), 4.0)
    commands = one.decide(targets(5, gateway=1, prefill=2, experts=2, decode=2), 5.0)
    assert [(one.kind, one.count) for one in commands] == [("gateway", 4), ("decode", 5)], "holds stay"


@pytest.mark.parametrize(
    "counts", [{"decode": 2}, {"decode": 2, "prefill": 3}], ids=["one pool alone", "to another count"]
)
def test_a_person_may_go_back_to_the_configured_count(counts: dict[str, int]):
    one, before = autoscaler(is_enabled=False), {"prefill": 2, "decode": 5}
    one.decide(targets(0, **before), 0.0)
    one.decide(targets(1, **before | counts), 1.0)
    assert {hold.kind: hold.count for hold in one.holds} == counts


@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_count_of_gateways_that_serve_lost_is_asked_for_again(is_enabled: bool):
    one = autoscaler(is_enabled=is_enabled)
    one.decide(targets(0, gateway=1), 0.0)
    one.hold("gateway", 3, "somebody", 1.0)
    [command] = one.decide(targets(OBEYED_S + 2, gateway=1), OBEYED_S + 2)
    assert (command.kind, command.count) == ("gateway", 3)


def test_what_we_asked_for_ourselves_is_no_hold():
    one = autoscaler()
    [command] = one.decide([decode(pages=90)], 0.0)
    one.target_seen("decode", 2, 1.0)  # not yet obeyed
    one.target_seen("decode", command.count, 2.0)
    assert state(one, "decode").hold is None


def test_a_person_may_be_quicker_than_our_ask():
    one = autoscaler()
    one.decide([decode(pages=90)], 0.0)
    one.target_seen("decode", 7, 1.0)
    assert state(one, "decode").hold.count == 7


def test_a_persons_own_count_is_not_taken_for_the_dashboards():
    one = autoscaler()
    one.target_seen("decode", 2, 0.0)
    one.hold("decode", 6, "the Pools page", 1.0)
    one.target_seen("decode", 2, 2.0)
    one.target_seen("decode", 6, 3.0)
    assert state(one, "decode").hold.by == "the Pools page"


def test_counts_set_in_quick_succession_are_all_ours():
    one = autoscaler()
    [command] = one.decide([decode(pages=90)], 0.0)
    one.hold("decode", 5, "the Pools page", 0.1)
    one.hold("decode", 6, "the Pools page", 0.2)
    for count in (2, command.count, 5, 6):
        one.target_seen("decode", count, 1.0)
        assert (state(one, "decode").hold.count, state(one, "decode").hold.by) == (6, "the Pools page")
    one.target_seen("decode", 5, 2.0)
    assert (state(one, "decode").hold.count, state(one, "decode").hold.by) == (5, DASHBOARD)


def test_a_call_that_was_lost_is_made_again_for_a_hold():
    for is_enabled in (True, False):
        one = autoscaler(is_enabled=is_enabled)
        one.target_seen("decode", 2, 0.0)
        one.hold("decode", 6, "somebody", 1.0)
        [command] = one.decide([decode(now_s=OBEYED_S + 2)], OBEYED_S + 2)
        assert (command.kind, command.count) == ("decode", 6)
        assert state(one, "decode").hold.count == 6
        assert any("Serve did not do it" in one.reason for one in one.report(0.0).decisions)


def test_a_hold_that_could_not_be_asked_for_is_as_if_it_never_was():
    one = autoscaler()
    one.target_seen("decode", 2, 0.0)
    one.hold("decode", 6, "somebody", 1.0)
    one.put_back("decode", None)
    assert state(one, "decode").hold is None
    assert one.decide([decode(now_s=2.0)], 2.0) == []
    assert state(one, "decode").target_count == 2


def test_a_new_coordinator_takes_holds_that_it_is_told_and_its_own_are_better():
    before, one = autoscaler(), autoscaler()
    before.hold("decode", 6, "somebody", 1.0)
    before.hold("prefill", 3, "somebody", 1.0)
    one.hold("prefill", 5, "another", 1.0)
    for hold in before.holds:
        one.recall(hold, 2.0)
    assert {hold.kind: hold.count for hold in one.holds} == {"decode": 6, "prefill": 5}
    [command] = [c for c in one.decide([decode(now_s=3.0)], 3.0) if c.kind == "decode"]
    assert command.count == 6, "and keeps them"


def test_growth_that_did_not_help_is_not_repeated():
    """Slow experts make decode slow too, and more decode nodes make them slower."""
    one, count, counts = autoscaler(), 2, []
    for second in range(0, 400, 2):
        slow = decode(count, pages=5, now_s=float(second), requests_count=9, inter_token_s=0.15)
        for command in one.decide([slow], float(second)):
            count = command.count
        counts.append(count)
    assert max(counts) == 3, "one more was tried"
    assert count < 3, "and it went again"
    assert "did not help" in state(one, "decode").outlook


def test_growth_that_helped_is_repeated():
    one, count = autoscaler(), 2
    for second in range(0, 200, 2):
        latency_s = 0.5 / count
        one_look = decode(count, pages=75, now_s=float(second), requests_count=40, inter_token_s=latency_s)
        for command in one.decide([one_look], float(second)):
            count = command.count
    assert count == 5


def test_a_role_that_nobody_can_change_is_not_waited_for():
    one = autoscaler()
    one.timed(start_s=20.0, role_change_s=1.0)
    for second in range(0, 14, 2):
        now_s = float(second)
        pages = 20 if second < 12 else 95
        commands = one.decide([decode(pages=pages, now_s=now_s), prefill(busy=0.1, now_s=now_s)], now_s)
    [change] = commands
    assert isinstance(change, ChangeRole)
    one.nobody_changes(change)
    [command] = one.decide([decode(pages=95, now_s=24.0), prefill(busy=0.8, now_s=24.0)], 24.0)
    assert isinstance(command, ScalePool)


@pytest.mark.parametrize(("count", "decisions_count"), [(2, 0), (5, 1)])
def test_the_first_target_after_a_restart_is_no_hold(count: int, decisions_count: int):
    one = autoscaler()
    one.target_seen("decode", count, 0.0)
    assert state(one, "decode").hold is None
    assert len(one.report(0.0).decisions) == decisions_count


@pytest.mark.parametrize(
    ("kind", "count"), [("decodes", 2), ("decode", 0), ("decode", 1025), ("coordinator", 1)]
)
def test_what_cannot_be_held_is_refused(kind: str, count: int):
    with pytest.raises(InvalidRequest):
        autoscaler().hold(kind, count, "somebody", 0.0)


# lending


def both(prefill_busy: float, decode_pages: int, now_s: float, counts: tuple[int, int], lent=(0, 0)):
    """Both pools by Serve's counts and by how many each has lent, all ready."""
    ours, theirs = counts[0] - lent[0] + lent[1], counts[1] - lent[1] + lent[0]
    return [
        prefill(ours, prefill_busy, now_s, target_count=counts[0], lent_count=lent[0]),
        decode(theirs, decode_pages, now_s, target_count=counts[1], lent_count=lent[1]),
    ]


def test_a_spare_prefill_node_becomes_a_decode_node_and_goes_home():
    one = autoscaler()
    for now_s in range(12):
        assert one.decide(both(0.1, 50, now_s, (3, 2)), now_s) == []
    [command] = one.decide(both(0.1, 90, 12, (3, 2)), 12)
    assert isinstance(command, ChangeRole) and (command.from_kind, command.to_kind) == ("prefill", "decode")
    assert one.decide(both(0.1, 90, 13, (3, 2)), 13) == []  # it has not shown yet
    assert [state(one, kind).target_count for kind in ("prefill", "decode")] == [3, 2]
    commands = []
    for now_s in range(14, 100):
        commands += one.decide(both(0.6, 1, now_s, (3, 2), (1, 0)), now_s)
        if commands:
            break
    [command] = commands
    assert (command.from_kind, command.to_kind) == ("decode", "prefill")


def test_more_than_can_be_lent_is_started():
    one = autoscaler()
    for now_s in range(12):
        one.decide(both(0.1, 50, now_s, (3, 2)), now_s)
    role, scale = one.decide(both(0.1, 150, 12, (3, 2)), 12)
    assert isinstance(role, ChangeRole) and scale == ScalePool("decode", 3, scale.reason)


def test_a_lender_in_need_calls_its_node_back_before_it_starts_one():
    one = autoscaler()
    for now_s in range(12):
        one.decide(both(0.6, 20, now_s, (3, 2), (1, 0)), now_s)
    [command] = one.decide(both(1.0, 20, 12, (3, 2), (1, 0)), 12)
    assert (command.from_kind, command.to_kind) == ("decode", "prefill")


def test_a_lender_in_need_starts_one_where_its_node_cannot_be_spared():
    one = autoscaler()
    for now_s in range(12):
        one.decide(both(0.6, 70, now_s, (3, 2), (1, 0)), now_s)
    [command] = one.decide(both(1.0, 70, 12, (3, 2), (1, 0)), 12)
    assert command.kind == "prefill" and command.count == 4


def test_who_has_lent_a_node_ends_none():
    one = autoscaler()
    for now_s in range(200):  # Serve might end the very node that decode needs
        assert one.decide(both(0.01, 70, now_s, (4, 2), (1, 0)), now_s) == []


@pytest.mark.parametrize("why", ["slower", "held", "at its fewest", "busy"])
def test_a_node_is_not_lent_where_that_would_be_wrong(why: str):
    one = autoscaler()
    if why == "slower":
        one.timed(start_s=2.0, role_change_s=3.0)
    counts = (1, 2) if why == "at its fewest" else (3, 2)
    for now_s in range(12):
        one.decide(both(0.6 if why == "busy" else 0.1, 50, now_s, counts), now_s)
    if why == "held":
        one.hold("prefill", 3, "somebody", 12.0)
    [command] = one.decide(both(0.1, 90, 12, counts), 12)
    assert isinstance(command, ScalePool)


def test_a_persons_count_brings_lent_nodes_home():
    one = autoscaler()
    one.decide(both(0.6, 50, 0, (3, 2), (1, 0)), 0)
    one.hold("prefill", 3, "somebody", 1.0)
    [command] = one.decide(both(0.6, 50, 2, (3, 2), (1, 0)), 2)
    assert (command.from_kind, command.to_kind) == ("decode", "prefill")


# whatever comes


@st.composite
def days(draw: st.DrawFn) -> list[tuple[float, float, str, int]]:
    """Loads of prefill and decode in nodes' worth, and what happens beside, look by look."""
    look = st.tuples(
        st.floats(0, 12),
        st.floats(0, 12),
        st.sampled_from(["", "", "", "", "hold", "release", "dashboard", "death", "silence"]),
        st.integers(1, 10),
    )
    return draw(st.lists(look, min_size=1, max_size=60))


class Serve:
    """Obeys every command at once, and loses nodes now and then."""

    def __init__(self) -> None:
        self.targets = {"prefill": 2, "decode": 2}
        self.lent = {"prefill": 0, "decode": 0}

    def nodes_count(self, kind: str) -> int:
        other = "decode" if kind == "prefill" else "prefill"
        return self.targets[kind] - self.lent[kind] + self.lent[other]

    def readings(self, loads: dict[str, float], dead: str, now_s: float) -> list[PoolReading]:
        found = []
        for kind, load in loads.items():
            count = self.nodes_count(kind)
            ready = max(count - (kind == dead), 0)
            starting = count - ready
            numbers = {"target_count": self.targets[kind], "lent_count": self.lent[kind]}
            numbers |= {"ready_count": ready, "starting_count": starting}
            if kind == "prefill":
                found.append(prefill(ready, min(load / ready, 1.0) if ready else None, now_s, **numbers))
            else:
                found.append(decode(ready, round(100 * load / ready) if ready else 0, now_s, **numbers))
        return found

    def obey(self, command: ScalePool | ChangeRole) -> None:
        if isinstance(command, ScalePool):
            self.targets[command.kind] = command.count
        elif self.lent[command.to_kind]:
            self.lent[command.to_kind] -= 1
        else:
            self.lent[command.from_kind] += 1


@settings(max_examples=150, deadline=None)
@given(days())
def test_bounds_and_holds_are_kept_and_every_change_has_a_reason(day):
    one, serve = autoscaler(shrink_pause_s=3.0, grow_pause_s=1.0), Serve()
    for now_s, (first, second, event, count) in enumerate(day):
        kind = "prefill" if count % 2 else "decode"
        if event == "hold":
            serve.targets[kind] = one.hold(kind, count, "somebody", now_s)
        elif event == "release":
            one.release(kind, now_s)
        elif event == "dashboard":
            serve.targets[kind] = count
        loads = {"prefill": first, "decode": second}
        readings = serve.readings(loads, kind if event == "death" else "", now_s)
        before = {pool.kind: pool.hold for pool in one.report(now_s).pools}
        for command in one.decide([] if event == "silence" else readings, now_s):
            assert command.reason and event != "silence"
            held = {pool.kind for pool in one.report(now_s).pools if pool.hold is not None}
            if isinstance(command, ScalePool):
                assert command.kind not in held
                assert 1 <= command.count <= 8
            elif held & {command.from_kind, command.to_kind}:
                assert serve.lent[command.to_kind], "only to go home"
            else:
                assert serve.nodes_count(command.from_kind) > 1
            serve.obey(command)
        for pool in one.report(now_s).pools:
            kept = before[pool.kind] is not None and event not in ("release", "dashboard")
            assert not kept or pool.hold is not None
    decisions = one.report(len(day)).decisions
    assert len(decisions) <= 100 and all(decision.reason for decision in decisions)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 7), st.floats(0, 7), st.integers(1, 8), st.integers(1, 8))
def test_under_constant_load_counts_settle(first: float, second: float, prefills: int, decodes: int):
    one, serve = autoscaler(shrink_pause_s=5.0, grow_pause_s=2.0), Serve()
    serve.targets = {"prefill": prefills, "decode": decodes}
    for now_s in range(200):
        for command in one.decide(serve.readings({"prefill": first, "decode": second}, "", now_s), now_s):
            assert now_s < 100, "still changing"
            serve.obey(command)
    for reading in serve.readings({"prefill": first, "decode": second}, "", 200):
        count = serve.nodes_count(reading.kind)
        assert count >= 8 or all(one.level <= 1 for one in pressures(reading, CONFIG))
        if first == second == 0:
            assert count == 1


def test_the_configuration_says_the_limits():
    config = ClusterConfig.model_validate({"model": {"folder": "."}, "decode": {"count": 3, "count_max": 5}})
    built = autoscaler_config(config)
    assert next(pool for pool in built.pools if pool.kind == "decode") == PoolLimits("decode", 3, 1, 5)
    assert built.is_enabled is False


@pytest.mark.parametrize(
    ("experts", "field"),
    [
        ({"shards_count": 4}, "experts.shards_count"),
        ({"shards_count": 6, "shards_max": 9}, "experts.shards_max"),
        ({"shards_count": 5, "shards_max": 8}, ""),
    ],
)
def test_a_pool_of_shards_that_would_swing_between_its_bounds_is_refused(experts: dict, field: str):
    """Grown to what the experts need and shrunk to the most allowed, for ever."""
    config = ClusterConfig.model_validate({"model": {"folder": "."}, "experts": experts})
    if field:
        with pytest.raises(InvalidConfig) as caught:
            autoscaler_config(config, (5, 8))
        assert (caught.value.field, caught.value.limit) == (field, "5 to 8")
    else:
        limits = autoscaler_config(config, (5, 8)).pools[-1]
        assert (limits.count_min, limits.count, limits.count_max) == (5, 5, 8)
