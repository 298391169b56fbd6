"""How many slots shards get, and plans before and after the search is there."""

import numpy as np
import pytest

from experts.config import PlanConfig
from experts.errors import PlacementImpossible
from experts.messages import ShardAddress
from experts.plan import Planner

LAYERS, EXPERTS = 2, 16


def shards(count: int) -> tuple[ShardAddress, ...]:
    """Shards by number, each on a host of its own."""
    return tuple(ShardAddress(f"s{index}", f"memory://{index}", f"h{index}") for index in range(count))


def planner(is_ready: bool = True, **config) -> Planner:
    """A planner whose search is there, or not yet."""
    made = Planner(PlanConfig(**config), LAYERS, EXPERTS, 1)
    made.is_ready = is_ready
    return made


@pytest.mark.parametrize(
    ("config", "shards_count", "slots_count"),
    [
        ({}, 4, 4),
        ({}, 3, 6),
        ({"spare_replicas": 4}, 4, 5),
        ({"replicas_min": 2}, 4, 8),
        ({"replicas_min": 2, "spare_replicas": 20}, 4, 9),
        ({"replicas_min": 3}, 2, 16),
        ({"spare_replicas": 400}, 4, 16),
        ({"slots_max": 5}, 2, 5),
    ],
)
def test_slots_are_what_the_replicas_take(config, shards_count, slots_count):
    assert planner(**config).slots_count(shards_count) == slots_count


@pytest.mark.parametrize("is_ready", [False, True])
@pytest.mark.parametrize(("shards_count", "replicas_min"), [(1, 1), (3, 1), (4, 2), (2, 3), (5, 3)])
def test_each_expert_has_its_replicas_on_different_shards(shards_count, replicas_min, is_ready):
    plan = planner(is_ready, replicas_min=replicas_min)
    homes = plan(np.zeros((LAYERS, EXPERTS)), shards(shards_count), None)
    assert len(homes) == LAYERS and all(len(layer) == EXPERTS for layer in homes)
    for home in (home for layer in homes for home in layer):
        assert len(home) >= min(replicas_min, shards_count) and list(home) == sorted(set(home))


def test_spare_replicas_go_to_hot_experts_once_the_search_is_there():
    load = np.ones((LAYERS, EXPERTS))
    load[:, 3] = 20
    homes = planner(spare_replicas=4)(load, shards(4), None)
    assert all(len(layer[3]) > 1 for layer in homes)


def test_too_little_memory_is_named():
    with pytest.raises(PlacementImpossible, match="too few"):
        planner(slots_max=3)(np.ones((LAYERS, EXPERTS)), shards(2), None)


@pytest.mark.parametrize("is_ready", [False, True])
def test_where_survivors_have_room_for_fewer_replicas_they_get_fewer(is_ready):
    plan = planner(is_ready, replicas_min=2, slots_max=12)
    homes = plan(np.ones((LAYERS, EXPERTS)), shards(3), None)
    assert min(len(home) for layer in homes for home in layer) == 2
    survivors = plan(np.ones((LAYERS, EXPERTS)), shards(2), None)
    assert min(len(home) for layer in survivors for home in layer) == 1


def test_before_the_search_is_there_experts_stay_where_they_are():
    current = ((((1,),) * 8 + ((),) * 8),) * LAYERS
    homes = planner(is_ready=False)(np.zeros((LAYERS, EXPERTS)), shards(3), current)
    assert all(home == (1,) for layer in homes for home in layer[:8])
    assert {home for layer in homes for home in layer[8:]} == {(0,), (2,)}
