"""The autoscaler over queues in fake time: a burst comes and goes, and a steady load moves nothing."""

import pytest

from cluster.autoscaler import Autoscaler
from cluster.scaling import AutoscalerConfig, ChangeRole, PoolLimits
from tests.cluster.simulated_pools import SimulatedCluster

NEVER_S = 1e6


def cluster(
    is_enabled: bool = True,
    start_s: float = 3.0,
    role_change_s: float = NEVER_S,
    count: int = 1,
    seed: int = 0,
    shrink_pause_s: float = 60.0,
) -> SimulatedCluster:
    pools = (PoolLimits("prefill", count, 1, 8), PoolLimits("decode", count, 1, 8))
    config = AutoscalerConfig(pools, is_enabled, shrink_pause_s=shrink_pause_s)
    return SimulatedCluster(Autoscaler(config), start_s, role_change_s, seed)


def burst(now_s: float) -> float:
    return 20.0 if 60 <= now_s < 180 else 1.0


@pytest.mark.parametrize("seed", range(3))
def test_a_burst_makes_pools_grow_separately_and_come_down_again(seed: int):
    scaled, fixed = cluster(seed=seed, shrink_pause_s=30.0), cluster(is_enabled=False, seed=seed)
    scaled.run(900.0, burst)
    fixed.run(900.0, burst)
    most_prefill, most_decode = (max(counts[pool] for counts in scaled.counts) for pool in (1, 2))
    assert min(most_prefill, most_decode) >= 3
    first = {command.kind: at_s for at_s, command in reversed(scaled.commands)}
    assert first["prefill"] != first["decode"]
    assert max(scaled.counts[-1][1:]) <= 2
    assert scaled.goodput(300.0, 2.0) > 2 * fixed.goodput(300.0, 2.0)
    assert len(fixed.commands) == 0


@pytest.mark.parametrize("rate", [3.0, 8.0, 15.0])
@pytest.mark.parametrize("start_s", [1.0, 20.0])
def test_a_noisy_steady_load_makes_nothing_swing(rate: float, start_s: float):
    one = cluster(start_s=start_s, seed=1)
    one.run(2400.0, lambda now_s: rate)
    late = [command for at_s, command in one.commands if at_s > 600.0]
    assert len(late) <= 6, late  # in half an hour, both pools together


def test_only_the_pool_that_is_short_grows():
    one = cluster(count=2)
    one.random.lognormvariate = lambda mean, spread: 100 if mean > 5 else 400  # short prompts, long answers
    one.run(200.0, lambda now_s: 8.0)
    kinds = {command.kind for _, command in one.commands if command.count > 2}
    assert kinds == {"decode"}


def test_a_spare_node_helps_out_and_goes_home():
    one = cluster(role_change_s=0.5, start_s=60.0, count=3)
    one.run(20.0, lambda now_s: 1.0)
    one.random.lognormvariate = lambda mean, spread: 100 if mean > 5 else 700
    one.run(120.0, lambda now_s: 8.0)
    roles = [(at_s, command) for at_s, command in one.commands if isinstance(command, ChangeRole)]
    assert roles and roles[0][1].to_kind == "decode"
    one.run(900.0, lambda now_s: 0.2)
    assert one.pools["prefill"].lent_count == one.pools["decode"].lent_count == 0
    assert max(one.counts[-1][1:]) == 1
