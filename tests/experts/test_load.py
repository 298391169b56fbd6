"""Load: slots counted by layer and expert, and remembered for a while."""

import pytest

from experts.load import ExpertLoad, RecentLoad


def test_slots_are_counted_where_they_fall():
    load = ExpertLoad(first_layer=3, layers_count=2, experts_count=4)
    load.add(3, [0, 2], [5, 1])
    load.add(4, (3,), (7,))
    load.add(3, [2], [10])
    assert RecentLoad(2, 4, 1.0, 1.0).read("a", load.told()).tolist() == [[5, 0, 11, 0], [0, 0, 0, 7]]
    assert load.slots_count == 23


def test_the_table_is_a_copy():
    load = ExpertLoad(0, 1, 2)
    before = load.told()
    load.add(0, [1], [1])
    assert [recent().read("a", told).tolist() for told in (before, load.told())] == [[[0, 0]], [[0, 1]]]


def test_what_is_no_table_is_refused():
    told = ExpertLoad(0, 1, 2).told()
    with pytest.raises(ValueError, match="reshape"):
        recent().read("a", 2 * told)
    with pytest.raises(ValueError, match="multiple"):
        recent().read("a", told[:-1])


def test_counts_go_on_beyond_32_bits():
    load, counted = recent(), ExpertLoad(0, 1, 2)
    for count in (0, 1 << 30, 1 << 30, 1 << 30, 1 << 30, 7):
        counted.add(0, [0], [count])
        totals = load.read("a", counted.told())
        load.observe("a", totals, 0.0)
    assert totals.tolist() == [[(1 << 32) + 7, 0]] and load.slots_count == (1 << 32) + 7


def test_a_shard_that_begins_anew_under_its_name_adds_nothing():
    load, counted = recent(), ExpertLoad(0, 1, 2)
    load.observe("a", [[9, 9]], 0.0)
    load.observe("a", load.read("a", counted.told()), 0.0)
    assert load.slots_count == 0


def recent(half_life_s: float = 10.0, burst_half_life_s: float = 1.0) -> RecentLoad:
    """One layer of two experts."""
    return RecentLoad(1, 2, half_life_s, burst_half_life_s)


def test_what_came_before_anybody_listened_counts_not():
    load = recent()
    load.observe("a", ((100, 0),), 0.0)
    assert load.slots_count == 0 and load.shares().tolist() == [[0.0, 0.0]]
    load.observe("a", ((100, 50),), 0.0)
    assert load.slots_count == 50 and load.shares().tolist() == [[0.0, 1.0]]


def test_shards_add_up():
    load = recent()
    for shard in "ab":
        load.observe(shard, ((0, 0),), 0.0)
    load.observe("a", ((30, 0),), 0.0)
    load.observe("b", ((0, 10),), 0.0)
    assert load.shares().tolist() == [[0.75, 0.25]]


def test_old_load_is_forgotten_by_halves():
    load = recent(half_life_s=10.0)
    load.observe("a", ((0, 0),), 0.0)
    load.observe("a", ((80, 0),), 0.0)
    load.observe("a", ((80, 0),), 10.0)
    assert load.slots_count == pytest.approx(40)


def test_a_burst_counts_at_once():
    load = recent(half_life_s=1000.0, burst_half_life_s=1.0)
    load.observe("a", ((0, 0),), 0.0)
    load.observe("a", ((10_000, 0),), 0.0)
    load.observe("a", ((10_000, 500),), 20.0)
    assert load.shares()[0, 1] > 0.9, "most of what came of late"
    assert load.shares()[0, 0] > 0.9, "and what has come for long is still expected"


def test_a_shard_that_began_anew_takes_nothing_away():
    load = recent()
    load.observe("a", ((0, 0),), 0.0)
    load.observe("a", ((50, 0),), 0.0)
    load.observe("a", ((3, 0),), 0.0)
    assert load.slots_count == 50
    load.observe("a", ((5, 0),), 0.0)
    assert load.slots_count == 52
    load.leave("a")
    load.observe("a", ((70, 0),), 0.0)
    assert load.slots_count == 52


def test_a_load_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        recent().observe("a", ((1, 2, 3),), 0.0)
