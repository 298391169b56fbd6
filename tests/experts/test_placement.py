"""Placement: every expert has one home, and no shard much more than another."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.messages import ShardAddress
from experts.placement import even_homes, even_placement, filled, housed


def addresses(count: int) -> list[ShardAddress]:
    """Shards by number."""
    return [ShardAddress(f"shard-{index:03}", f"tcp://host:{1000 + index}") for index in range(count)]


@given(shards_count=st.integers(1, 40), more=st.integers(0, 300), layers_count=st.integers(1, 4))
def test_every_expert_has_one_home_and_shards_are_even(shards_count, more, layers_count):
    experts_count = shards_count + more
    placement = even_placement(addresses(shards_count), 3, layers_count, experts_count, 7)
    assert placement.epoch == 7 and len(placement.homes) == layers_count
    for homes in placement.homes:
        held = Counter(shard for (shard,) in homes)
        assert len(homes) == experts_count and set(held) == set(range(shards_count))
        assert max(held.values()) - min(held.values()) <= 1
    owned = [pair for shard in placement.shards for pair in placement.experts_of(shard.name)]
    every = [(layer, expert) for layer in range(3, 3 + layers_count) for expert in range(experts_count)]
    assert sorted(owned) == every


def test_neighbours_share_a_shard():
    homes = even_placement(addresses(3), 0, 1, 16, 1).homes[0]
    assert list(homes) == sorted(homes)


def test_the_order_in_which_shards_come_changes_nothing():
    shards = addresses(5)
    assert even_placement(shards[::-1], 1, 2, 16, 1) == even_placement(shards, 1, 2, 16, 1)


def test_a_stranger_holds_nothing():
    assert even_placement(addresses(2), 1, 2, 16, 1).experts_of("somebody else") == []


@pytest.mark.parametrize("shards_count", [0, 17])
def test_too_few_or_too_many_shards_are_refused(shards_count):
    with pytest.raises(ValueError, match=f"{shards_count} shards for 16 experts: there must be 1 to 16"):
        even_placement(addresses(shards_count), 1, 2, 16, 1)


def test_who_has_no_home_gets_one_where_fewest_are():
    assert filled((((0,), (), (), (1,)),), 3, 1) == (((0,), (2,), (0,), (1,)),)
    assert filled((((0,), (0, 1)),), 3, 2) == (((0, 2), (0, 1)),)


def test_who_has_no_home_left_gets_one_on_an_able_shard_and_replicas_make_room():
    assert housed((((1,), (), (1,), ()),), [0, 2]) == (((1,), (0,), (1,), (2,)),)
    full = ((0, 1), (0, 2), (1, 2), ())
    assert housed((full,), [0, 2]) == (((1,), (0, 2), (1, 2), (0,)),)
    assert housed((((0,), ()),), [0]) == (((0,), (0,)),), "better too many than none"
    assert housed((full[:3],), []) == (full[:3],)


@given(shards_count=st.integers(1, 9), experts_count=st.integers(1, 40), replicas_count=st.integers(1, 9))
def test_even_homes_have_their_replicas_on_different_shards(shards_count, experts_count, replicas_count):
    for home in even_homes(shards_count, experts_count, replicas_count):
        assert len(home) == min(replicas_count, shards_count) and list(home) == sorted(set(home))
