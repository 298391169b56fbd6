"""Balance in the three conventions, on numbers reckoned by hand."""

import numpy as np
import pytest

from experts.balance import balance_of, shard_loads


def test_an_experts_load_is_shared_by_its_replicas():
    load = np.array([[6.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    homes = (((0, 1, 2), (0,), (1,)), ((0,), (1,), (1, 2)))
    assert shard_loads(load, homes, 3).tolist() == [[4.0, 3.0, 2.0], [0.0, 4.5, 4.5]]


def test_the_three_conventions():
    balance = balance_of(np.array([[4.0, 2.0], [1.0, 1.0]]))
    assert balance.mean_over_max == pytest.approx((3 / 4 + 1) / 2)
    assert balance.means_over_maxes == pytest.approx((3 + 1) / (4 + 1))
    assert balance.excess == pytest.approx((1 / 3 + 0) / 2)
    assert balance.slowness == pytest.approx(5 / 4)


def test_layers_without_load_are_left_out():
    assert balance_of(np.array([[4.0, 2.0], [0.0, 0.0]])) == balance_of(np.array([[4.0, 2.0]]))
    assert balance_of(np.zeros((3, 2))).slowness == 1.0
    assert balance_of(np.zeros((0, 0))).slowness == 1.0
