"""Plans of splits: whole contexts, full waves, scratch within bounds."""

import pytest

from kernels.ops.split_context import (
    INVARIANT_SPLITS_MAX,
    INVARIANT_UNIT_TOKENS,
    UNIT_TOKENS,
    SplitPlan,
    invariant_split_plan,
    split_plan,
)

RUNNING_COUNT = 132


def waves_share(plan: SplitPlan, tiles_count: int) -> float:
    """How much of the waves that its programs take is used."""
    programs_count = tiles_count * plan.splits_count
    return programs_count / (-(-programs_count // RUNNING_COUNT) * RUNNING_COUNT)


@pytest.mark.parametrize(
    ("requests_count", "row_tiles_count", "context_tokens_max", "splits_count"),
    [
        (1, 2, 65_536, 64),  # units of 256 tokens: 66 splits would not be shorter than 64 are
        (1, 1, 256, 1),
        (1, 1, 0, 1),
        (1, 2, 1_024, 4),
        (66, 2, 4_096, 1),
        (128, 2, 65_536, 1),
        (8, 2, 8_192, 8),
        (32, 2, 8_192, 2),
    ],
)
def test_batches_are_split_into_full_waves(requests_count, row_tiles_count, context_tokens_max, splits_count):
    plan = split_plan(requests_count, row_tiles_count, context_tokens_max, RUNNING_COUNT)
    assert plan == SplitPlan(UNIT_TOKENS, splits_count)


@pytest.mark.parametrize("requests_count", [1, 3, 8, 20, 67, 128])
@pytest.mark.parametrize("context_tokens_max", [1, 700, 8_192, 131_072])
def test_a_plan_splits_neither_below_a_unit_nor_into_waves_that_idle(requests_count, context_tokens_max):
    plan = split_plan(requests_count, 2, context_tokens_max, RUNNING_COUNT)
    assert (plan.splits_count - 1) * plan.unit_tokens < context_tokens_max
    if context_tokens_max >= 131_072:
        assert waves_share(plan, requests_count * 2) > 0.9


@pytest.mark.parametrize(
    ("context_tokens_max", "splits_count"),
    [(0, 1), (64, 1), (1_024, 1), (1_025, 2), (32_768, 32), (32_769, 32), (163_840, 32)],
)
def test_invariant_splits_are_as_many_as_the_context_has_room_for(context_tokens_max, splits_count):
    plan = invariant_split_plan(context_tokens_max)
    assert plan == SplitPlan(INVARIANT_UNIT_TOKENS, splits_count)
    assert plan.splits_count <= INVARIANT_SPLITS_MAX
