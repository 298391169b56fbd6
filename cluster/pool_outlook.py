"""What people are told of a pool: how things stand, and what the autoscaler waits for."""

from cluster.scaled_pool import ScaledPool
from cluster.scaling import GATEWAY, PoolState


def outlook(pool: ScaledPool, pause_s: float, is_enabled: bool, is_loaded: bool, now_s: float) -> str:
    """Why a pool's count stays as it is for now; `pause_s` is for how long one less must have been enough."""
    if pool.hold is not None:
        return f"held at {pool.hold.count} by {pool.hold.by}"
    if pool.kind == GATEWAY or not is_enabled:
        return "people set its count"
    if not is_loaded:
        return "the cluster still loads"
    if not pool.is_heard(now_s):
        return "nothing was heard of it of late, so its count stays"
    if pool.is_awaited:
        return "waits for Serve to show what was asked for"
    if pool.changing_since_s is not None:
        return "nodes are starting or draining"
    if not pool.pressures or not pool.reading.is_complete:
        return "too little is known of its load"
    if pool.futile_causes:
        return f"more nodes did not help against the {', '.join(sorted(pool.futile_causes))}"
    if max(one.level for one in pool.pressures) > 1:
        return "at its most" if pool.nodes_count >= pool.limits.count_max else "under pressure"
    if pool.roomy_since_s is not None:
        return f"one less was enough for {now_s - pool.roomy_since_s:.0f} s of {pause_s:.0f} s"
    return "as many as the load asks for"


def state_of(pool: ScaledPool, words: str) -> PoolState:
    """A pool as people see it, with its outlook in words."""
    reading = pool.reading
    return PoolState(
        pool.kind,
        pool.aim_count,
        reading.ready_count if reading else 0,
        reading.starting_count if reading else 0,
        reading.draining_count if reading else 0,
        pool.lent_count,
        pool.borrowed_count,
        pool.limits.count_min,
        pool.limits.count_max,
        pool.hold,
        pool.pressures,
        pool.reason,
        words,
        pool.grown_count,
        pool.shrunk_count,
    )
