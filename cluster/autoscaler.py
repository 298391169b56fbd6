"""How many nodes each pool has, from what hurts: a state machine, time is an argument.

Quick to grow: at once, by as many as the pressure asks, at most doubled at a time. Slow to shrink: one at a
time, once one less would have been enough without a break. A node that the other pool can spare changes its
role where that is faster than starting one, and goes home before anybody is ended for it. A count that a
person has set holds until it is released. Gateways are set by people only.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from cluster.errors import InvalidRequest
from cluster.pool_outlook import outlook, state_of
from cluster.pressure import pressures
from cluster.scaled_pool import OBEYED_S, ScaledPool
from cluster.scaling import (
    GATEWAY,
    PARTNERS,
    AutoscalerConfig,
    ChangeRole,
    Decision,
    Hold,
    PoolReading,
    PoolsReport,
    Pressure,
    ScalePool,
)

GROWTH_MAX = 2  # times as many at once, at most
GREATER = 1.25  # times the pressure that asked for nodes which are still starting, before more are asked for
ROOM = 0.7  # of each limit, that may be in use with one node less, for a pool to be too large
STUCK_S = 600.0  # after which nodes that do not start are no reason to wait with shrinking
SETTLED_S = 20.0  # after a growth, before latencies of late are those with the new nodes
REGRET_PAUSES = 10  # after shrinking, in which to grow again says that it was wrong
REGRET_MAX = 8  # times the pause before shrinking, at most
DECISIONS_MAX = 100
COUNT_MAX = 1024
DASHBOARD = "the dashboard's API"
Command = ScalePool | ChangeRole


class Autoscaler:
    """All pools of a cluster; what it forgets in a restart of the coordinator are holds and reasons alone."""

    def __init__(self, config: AutoscalerConfig):
        self.config = config
        self._pools = {limits.kind: ScaledPool(limits) for limits in config.pools}
        for pool in self._pools.values():
            pool.partner = self._pools.get(PARTNERS.get(pool.kind, ""))
        self._decisions: deque[Decision] = deque(maxlen=DECISIONS_MAX)
        self._is_loaded = True
        self._start_s = 10.0
        self._role_change_s = 1.0  # weights are there already, so less than a start until it is measured

    def timed(self, start_s: float | None = None, role_change_s: float | None = None) -> None:
        """Take how long the last start of a node took, or its last change of role."""
        self._start_s = start_s if start_s is not None else self._start_s
        self._role_change_s = role_change_s if role_change_s is not None else self._role_change_s

    def decide(self, readings: Iterable[PoolReading], now_s: float, is_loaded: bool = True) -> list[Command]:
        """What to change now; a pool without a fresh reading, or with a hold, keeps its count.

        Until the cluster has loaded, only what people have set is done: idle nodes say nothing of any load.
        """
        self._see_targets(self.observe(readings, now_s), now_s)
        everybody = [pool for pool in self._pools.values() if self._may_act(pool, now_s)]
        commands = [command for pool in everybody for command in self._keep_hold(pool, now_s)]
        self._is_loaded = is_loaded
        if not self.config.is_enabled or not is_loaded:
            return commands
        pools = [pool for pool in self._pools.values() if pool.kind != GATEWAY]
        for pool in pools:
            self._look(pool, now_s)
        for turn in (self._go_home, self._keep_bounds, self._grow, self._shrink):
            for pool in pools:
                if self._may_act(pool, now_s):
                    commands.extend(turn(pool, now_s))
        return commands

    def observe(self, readings: Iterable[PoolReading], now_s: float) -> list[ScaledPool]:
        """Take what was measured of pools, so that it can be seen; those that were read."""
        read = [(self._pools[reading.kind], reading) for reading in readings if reading.kind in self._pools]
        for pool, reading in read:
            pool.reading, pool.seen_s = reading, now_s
            pool.pressures = pressures(reading, self.config)
        return [pool for pool, _ in read]

    # what people say

    def hold(self, kind: str, count: int | None, by: str, now_s: float) -> int:
        """Keep a pool at a count, or at what it has now, until released; raises InvalidRequest.

        Returns the count, which the caller then has Serve aim at: a person's will waits for no look.
        """
        pool = self._pool(kind)
        count = pool.aim_count if count is None else count
        if not 1 <= count <= COUNT_MAX:
            raise InvalidRequest(
                "COUNT_OUT_OF_BOUNDS",
                f"{count} actors cannot be set",
                field="count",
                limit=f"1 to {COUNT_MAX}",
                remedy="Ask for a count within the limit.",
            )
        pool.hold = Hold(kind, count, by, now_s)
        self._record(pool, pool.aim_count, count, f"set by {by}; it holds until released", now_s)
        if pool.is_awaited or count != pool.target_count:
            pool.ask(count, now_s)
        return count

    @property
    def holds(self) -> tuple[Hold, ...]:
        """Counts that people have set, and that nobody has released."""
        return tuple(pool.hold for pool in self._pools.values() if pool.hold is not None)

    def recall(self, hold: Hold, now_s: float) -> None:
        """Take a hold that an earlier coordinator had, unless there is one already."""
        pool = self._pools.get(hold.kind)
        if pool is not None and pool.hold is None:
            pool.hold = replace(hold, since_s=now_s)

    def put_back(self, kind: str, hold: Hold | None) -> None:
        """Serve could not be asked for what a person wanted: all is as before."""
        pool = self._pool(kind)
        pool.hold = hold
        pool.ask_no_more()

    def nobody_changes(self, command: ChangeRole) -> None:
        """No node could be asked to change its role."""
        for kind in (command.from_kind, command.to_kind):
            self._pools[kind].loans_asked = None

    def release(self, kind: str, now_s: float) -> None:
        """Let the load decide about a pool again; one that is not held stays as it is. Or InvalidRequest."""
        pool = self._pool(kind)
        if pool.hold is not None:
            self._record(pool, pool.aim_count, pool.aim_count, f"the hold by {pool.hold.by} ended", now_s)
            pool.hold = pool.roomy_since_s = None

    def target_seen(self, kind: str, count: int, now_s: float) -> None:
        """Take what Serve aims at; what nobody here asked for was set by a person, and holds.

        The first count that is seen after a start holds in no case, even where it is not the configured one:
        most likely it is what this autoscaler asked for in an earlier life, and a hold that nobody set would
        leave the pool at the load of that moment for good. A person who wants it to hold can say so again.
        """
        pool = self._pool(kind)
        before = pool.target_count
        if before is None:
            pool.target_count = count
            if count != pool.limits.count:
                reason = f"found at {count} by a coordinator that has just begun; it is taken as it is"
                self._record(pool, pool.limits.count, count, reason, now_s)
        elif count == pool.asked_count:
            pool.target_count = count
            pool.ask_no_more()
        elif count != before and count in pool.overtaken_counts:
            pool.target_count = count
        elif count != before:
            pool.target_count = count
            pool.ask_no_more()
            pool.hold = Hold(kind, count, DASHBOARD, now_s)
            self._record(pool, before, count, f"set by {DASHBOARD}; it holds until released", now_s)
        elif pool.asked_count is not None and now_s - pool.asked_s > OBEYED_S:
            self._record(pool, pool.asked_count, count, f"Serve did not do it within {OBEYED_S:.0f} s", now_s)
            pool.ask_no_more()

    def _see_targets(self, pools: Iterable[ScaledPool], now_s: float) -> None:
        """Take what Serve aims at for all that were read.

        A configuration that is deployed anew puts all counts back to what it says, in one look; people, whose
        counts hold, set one pool after the other.
        """
        heard = [pool for pool in pools if pool.is_heard(now_s)]
        moved = [pool for pool in heard if pool.is_moved_by_others(pool.reading.target_count)]
        is_deployed = all(pool.reading.target_count == pool.limits.count for pool in heard)
        for pool in moved if is_deployed and len(moved) > 1 else ():
            count = pool.limits.count
            self._record(pool, pool.target_count, count, "the configuration was deployed anew", now_s)
            pool.target_count = count
            pool.ask_no_more()
        for pool in heard:
            self.target_seen(pool.kind, pool.reading.target_count, now_s)

    def report(self, now_s: float) -> PoolsReport:
        """All pools and the decisions of late, newest first."""
        states = tuple(state_of(pool, self._outlook(pool, now_s)) for pool in self._pools.values())
        return PoolsReport(now_s, self.config.is_enabled, states, tuple(reversed(self._decisions)))

    # what is measured

    def _look(self, pool: ScaledPool, now_s: float) -> None:
        """Note since when a pool is changing, and since when it is too large."""
        pool.notice_loans(now_s)
        is_changing = pool.is_heard(now_s) and pool.is_changing
        pool.changing_since_s = _since(pool.changing_since_s, now_s) if is_changing else None
        if not is_changing and not pool.is_awaited:
            pool.level_asked = 1.0
        is_grown = not is_changing and now_s - pool.grown_s >= SETTLED_S
        pool.learn_from_growth(is_grown and not pool.is_awaited)
        is_roomy = self._is_roomy(pool, now_s)
        pool.roomy_since_s = _since(pool.roomy_since_s, now_s) if is_roomy else None
        if now_s - max(pool.shrunk_s, pool.grown_s) > REGRET_PAUSES * self._shrink_pause_s(pool):
            pool.regret = 1

    def _is_roomy(self, pool: ScaledPool, now_s: float) -> bool:
        """Whether one node less would be enough, as far as everything is known and nothing is under way."""
        if not pool.is_heard(now_s) or pool.is_awaited or not pool.pressures or not pool.reading.is_complete:
            return False
        is_stuck = pool.changing_since_s is not None and now_s - pool.changing_since_s > STUCK_S
        if pool.changing_since_s is not None and not is_stuck:
            return False
        left_count = pool.nodes_count - 1
        if left_count < max(pool.limits.count_min, 1):
            return False
        ready_count = pool.reading.ready_count
        return all(one.level_with(left_count, ready_count) < ROOM for one in pool.causes)

    def _may_act(self, pool: ScaledPool, now_s: float) -> bool:
        is_seen = pool.seen_s == now_s and pool.is_heard(now_s)
        return is_seen and pool.aim_count > 0 and not pool.is_awaited

    # what is done about it

    def _keep_hold(self, pool: ScaledPool, now_s: float) -> Iterator[Command]:
        """Ask again for a person's count that Serve has not taken."""
        if pool.hold is not None and pool.hold.count != pool.aim_count:
            yield self._scale(pool, pool.hold.count, f"set by {pool.hold.by}, and not done yet", now_s)

    def _go_home(self, pool: ScaledPool, now_s: float) -> Iterator[Command]:
        """Where a person has set one of two pools, each gets back what the other has of it."""
        partner = pool.partner
        if partner is None or not pool.borrowed_count or not (pool.hold or partner.hold):
            return
        if self._may_act(partner, now_s):
            yield self._change_role(pool, partner, "a person has set how many there are", now_s)

    def _keep_bounds(self, pool: ScaledPool, now_s: float) -> Iterator[Command]:
        if pool.hold is not None:
            return
        limits = pool.limits
        if pool.aim_count > limits.count_max:
            yield self._scale(pool, limits.count_max, f"{limits.count_max} are the most allowed", now_s)
        elif pool.aim_count < limits.count_min:
            yield self._scale(pool, limits.count_min, f"{limits.count_min} are the fewest allowed", now_s)

    def _grow(self, pool: ScaledPool, now_s: float) -> Iterator[Command]:
        cause = max(pool.causes_to_grow, key=lambda one: self._wanted_count(pool, one), default=None)
        nodes_count = pool.nodes_count
        if pool.hold is not None or cause is None or self._wanted_count(pool, cause) <= nodes_count:
            return
        is_starting = pool.reading.ready_count < nodes_count
        if now_s - pool.grown_s < self.config.grow_pause_s or (
            is_starting and cause.level <= GREATER * pool.level_asked
        ):
            return
        wanted_count = min(self._wanted_count(pool, cause), GROWTH_MAX * nodes_count, pool.limits.count_max)
        missing_count = wanted_count - nodes_count
        reason = f"{cause.words}, above {cause.limit_words}"
        aim_count = pool.aim_count
        lender = self._lender(pool, now_s) if missing_count > 0 else None
        if lender is not None:
            yield self._change_role(lender, pool, reason, now_s)
            missing_count -= 1
        count = min(aim_count + missing_count, pool.limits.count_max)
        if count > aim_count:
            yield self._scale(pool, count, reason, now_s)
        if lender is not None or count > aim_count:
            if now_s - pool.shrunk_s < REGRET_PAUSES * self.config.shrink_pause_s:
                pool.regret = min(2 * pool.regret, REGRET_MAX)
            pool.grown_s, pool.level_asked = now_s, cause.level
            pool.grown_for = None if cause.is_shared else cause

    def _shrink(self, pool: ScaledPool, now_s: float) -> Iterator[Command]:
        """One less; a borrowed node goes home first, and who has lent one has shrunk by that already."""
        pause_s = self._shrink_pause_s(pool)
        if pool.hold is not None or pool.roomy_since_s is None or now_s - pool.roomy_since_s < pause_s:
            return
        partner = pool.partner
        fullest = max(pool.pressures, key=lambda one: one.level)
        reason = f"for {pause_s:.0f} s one less was enough: {fullest.words}"
        if pool.borrowed_count:
            if self._may_act(partner, now_s):
                yield self._change_role(pool, partner, reason, now_s)
        elif not pool.lent_count and pool.aim_count > pool.limits.count_min:
            pool.shrunk_s = now_s
            yield self._scale(pool, pool.aim_count - 1, reason, now_s)

    def _wanted_count(self, pool: ScaledPool, cause: Pressure) -> int:
        """Nodes that a cause asks for: in proportion where it is shared by all, else one more."""
        ready_count = pool.reading.ready_count
        if cause.level <= 1:
            return 0
        return math.ceil(ready_count * cause.level - 1e-9) if cause.is_shared else ready_count + 1

    def _lender(self, pool: ScaledPool, now_s: float) -> ScaledPool | None:
        """The other pool, where it has had a node to spare for a while which comes sooner than a new one."""
        partner = pool.partner
        if partner is None or partner.hold is not None or not self._may_act(partner, now_s):
            return None
        roomy_since_s = math.inf if partner.roomy_since_s is None else partner.roomy_since_s
        is_spare = now_s - roomy_since_s >= self.config.grow_pause_s
        comes_home = pool.lent_count > 0
        return partner if is_spare and (comes_home or self._role_change_s < self._start_s) else None

    def _change_role(self, lender: ScaledPool, to: ScaledPool, reason: str, now_s: float) -> ChangeRole:
        """Both pools wait until the loan shows."""
        for pool, step in ((lender, -1), (to, 1)):
            nodes_count = pool.nodes_count
            words = f"a {lender.kind} node becomes a {to.kind} node: {to.kind}: {reason}"
            if step < 0 and lender.borrowed_count:
                words = f"a {to.kind} node that was lent goes home: {reason}"
            self._record(pool, nodes_count, nodes_count + step, words, now_s)
        for pool in (lender, to):
            pool.loans_asked = (pool.lent_count, pool.borrowed_count)
            pool.asked_s, pool.roomy_since_s = now_s, None
        return ChangeRole(lender.kind, to.kind, reason)

    def _scale(self, pool: ScaledPool, count: int, reason: str, now_s: float) -> ScalePool:
        self._record(pool, pool.aim_count, count, reason, now_s)
        pool.ask(count, now_s)
        pool.roomy_since_s = None
        return ScalePool(pool.kind, count, reason)

    def _record(self, pool: ScaledPool, from_count: int, to_count: int, reason: str, now_s: float) -> None:
        pool.reason = reason
        pool.grown_count += to_count > from_count
        pool.shrunk_count += to_count < from_count
        self._decisions.append(Decision(now_s, pool.kind, from_count, to_count, reason))

    # what follows from what is kept

    def _pool(self, kind: str) -> ScaledPool:
        if kind not in self._pools:
            raise InvalidRequest(
                "UNKNOWN_POOL",
                f"there is no pool {kind[:80]!r}",
                field="kind",
                limit=f"one of {', '.join(self._pools)}",
                remedy="Name one of these.",
            )
        return self._pools[kind]

    def _outlook(self, pool: ScaledPool, now_s: float) -> str:
        return outlook(pool, self._shrink_pause_s(pool), self.config.is_enabled, self._is_loaded, now_s)

    def _shrink_pause_s(self, pool: ScaledPool) -> float:
        """Longer after a shrinking that had to be undone, so that no load makes a pool swing for ever."""
        return pool.regret * self.config.shrink_pause_s


def _since(before_s: float | None, now_s: float) -> float:
    return now_s if before_s is None else before_s
