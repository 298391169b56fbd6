"""Which shard computes what: right for any placement, even inside a batch, never a shard that is down."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.messages import Placement, ShardAddress
from experts.route import Route

FIRST_LAYER = 3


def route_of(homes: tuple[tuple[int, ...], ...], hosts: tuple[str, ...], host: str = "") -> Route:
    """A route by one layer's homes."""
    shards = tuple(ShardAddress(f"s{index}", f"memory://{index}", at) for index, at in enumerate(hosts))
    return Route(Placement(1, FIRST_LAYER, shards, (homes,)), host)


def slots_by_shard(route: Route, ids: torch.Tensor, call_id: int = 0, down: tuple[str, ...] = ()) -> Counter:
    """How many slots each shard has."""
    _, shares = route.split(FIRST_LAYER, ids, call_id, down)
    return Counter({share.shard: len(share.rows) for share in shares})


@st.composite
def dispatches(draw):
    """A placement, token choices, a call's number, and shards that are down."""
    shards_count, experts_count = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    indices = st.integers(0, shards_count - 1)
    homes = tuple(tuple(sorted(draw(st.sets(indices, min_size=1)))) for _ in range(experts_count))
    choices_count = draw(st.integers(1, min(4, experts_count)))
    tokens_count = draw(st.integers(1, 20))
    numbers = draw(
        st.lists(
            st.permutations(range(experts_count)).map(lambda order: order[:choices_count]),
            min_size=tokens_count,
            max_size=tokens_count,
        )
    )
    down = tuple(f"memory://{shard}" for shard in draw(st.sets(indices)))
    return homes, shards_count, torch.tensor(numbers), draw(st.integers(0, 100)), down


@given(dispatches())
def test_every_slot_goes_once_to_a_home_of_its_expert(case):
    homes, shards_count, ids, call_id, down = case
    order, shares = route_of(homes, ("",) * shards_count).split(FIRST_LAYER, ids, call_id, down)
    assert sorted(order.tolist()) == list(range(ids.numel()))
    flat, choices_count, end = ids.flatten().tolist(), ids.shape[1], 0
    for share in shares:
        assert share.slots.start == end and share.experts == sorted(set(share.experts))
        end = share.slots.stop
        expected = [
            expert for expert, count in zip(share.experts, share.counts, strict=True) for _ in range(count)
        ]
        slots = order[share.slots].tolist()
        assert [flat[slot] for slot in slots] == expected
        assert share.tokens[share.rows].tolist() == [slot // choices_count for slot in slots]
        assert share.tokens.tolist() == sorted(set(share.tokens.tolist())) and len(share.tokens) <= len(ids)
        for expert in share.experts:
            assert share.shard in homes[expert]
            others_up = any(f"memory://{home}" not in down for home in homes[expert])
            assert f"memory://{share.shard}" not in down or not others_up
    assert end == ids.numel()


@given(st.integers(1, 60), st.integers(2, 8), st.integers(0, 1000))
def test_replicas_of_one_expert_share_a_batch_evenly(tokens_count, shards_count, call_id):
    route = route_of((tuple(range(shards_count)),), ("",) * shards_count)
    counts = slots_by_shard(route, torch.zeros(tokens_count, 1, dtype=torch.int64), call_id)
    assert max(counts.values()) == -(-tokens_count // shards_count)


def test_spare_replicas_fill_up_what_single_homes_leave():
    """Expert 0 has one home, with many tokens; expert 1 could go there too, and does not."""
    ids = torch.tensor([[0]] * 6 + [[1]] * 6)
    assert slots_by_shard(route_of(((0,), (0, 1)), ("", "")), ids) == {0: 6, 1: 6}


def test_single_tokens_take_turns():
    route = route_of(((0, 1, 2),), ("", "", ""))
    alone = torch.zeros(1, 1, dtype=torch.int64)
    assert {min(slots_by_shard(route, alone, call_id)) for call_id in range(3)} == {0, 1, 2}


def test_of_two_homes_equally_loaded_the_nearer_is_taken():
    route = route_of(((0, 1),), ("far", "near"), host="near")
    alone = torch.zeros(1, 1, dtype=torch.int64)
    assert all(slots_by_shard(route, alone, call_id) == {1: 1} for call_id in range(4))
    assert slots_by_shard(route, alone.expand(4, 1), 0) == {0: 2, 1: 2}, "load comes before nearness"


def test_both_ends_compute_the_same():
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (30, 2)))
    homes = ((0, 1), (1, 2), (0, 2), (0, 1, 2))
    node, shard = (route_of(homes, ("a", "b", "c")) for _ in range(2))
    assert torch.equal(node.split(FIRST_LAYER, ids, 7)[0], shard.split(FIRST_LAYER, ids, 7)[0])


@pytest.mark.parametrize(("down", "others"), [((), True), (("memory://0",), True), (("memory://1",), False)])
def test_others_hold_what_has_a_second_home(down, others):
    route = route_of(((0, 1), (1,)), ("", ""))
    assert route.has_others(FIRST_LAYER, [0, 1], down) == others
