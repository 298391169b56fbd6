"""Distributions: what is counted, subtracted and merged, and how true quantiles are."""

import pickle
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.distribution import NOTHING, SECONDS, Distribution, Tally, merged


def of(*values: float, bounds: tuple[float, ...] = SECONDS) -> Distribution:
    """The distribution of some values."""
    tally = Tally(bounds)
    for value in values:
        tally.observe(value)
    return tally.distribution()


def test_a_value_at_a_bound_belongs_below_it():
    assert of(1.0, 1.5, 2.0, 9.0, bounds=(1.0, 2.0)).counts == (1, 2, 1)
    assert of(1.0, 1.5, 2.0, 9.0, bounds=(1.0, 2.0)).counts_up_to == (1, 3, 4)


def test_equal_values_are_counted_at_once():
    tally = Tally()
    tally.observe(0.02, 5)
    assert tally.distribution().counts == of(*[0.02] * 5).counts
    assert tally.distribution().mean == pytest.approx(0.02)


def test_what_was_told_does_not_change_afterwards():
    tally = Tally()
    before = tally.distribution()
    tally.observe(1.0)
    assert before == NOTHING
    assert tally.distribution().count == 1


def test_the_difference_of_two_states_is_what_came_between():
    tally = Tally()
    tally.observe(0.5)
    before = tally.distribution()
    tally.observe(2.0)
    assert tally.distribution().since(before) == of(2.0)


def test_one_who_began_anew_is_taken_whole():
    after = of(0.01)
    assert after.since(of(2.0, 3.0)) == after
    assert after.since(None) == after
    assert after.since(of(2.0, bounds=(1.0, 2.0))) == after


def test_none_has_no_quantile_and_no_mean():
    assert NOTHING.quantile(0.5) is None
    assert NOTHING.mean is None


def test_beyond_the_last_bound_the_last_bound_is_told():
    assert of(10_000.0).quantile(0.5) == SECONDS[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.001, 600, allow_nan=False), min_size=1, max_size=60),
    st.sampled_from([0.5, 0.9, 0.99]),
)
def test_a_quantile_lies_between_the_bounds_of_the_value_that_it_means(values: list[float], share: float):
    ordered = sorted(values)
    exact = ordered[min(-(-int(share * 1000) * len(values) // 1000), len(values)) - 1]
    high = next(bound for bound in SECONDS if bound >= exact)
    low = max((bound for bound in SECONDS if bound < exact), default=0.0)
    assert low * 0.999 <= of(*values).quantile(share) <= high * 1.001


def test_bounds_are_close_together():
    assert all(low < high <= 2 * low for low, high in pairwise(SECONDS))


def test_merging_adds():
    assert merged([of(0.5), of(0.25, 3.0)]) == of(0.5, 0.25, 3.0)
    assert merged([]) == NOTHING
    with pytest.raises(ValueError, match="bounds"):
        merged([NOTHING, of(bounds=(1.0, 2.0))])


def test_it_travels_and_is_small():
    distribution = of(*[0.001 * number for number in range(1000)])
    data = pickle.dumps(distribution)
    assert pickle.loads(data) == distribution
    assert len(data) < 1000
