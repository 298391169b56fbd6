"""From one placement of experts to the next, while requests run: a state machine, time is an argument.

A placement is given out to the shards, which load what is new to them; once all have, it is in force and
nodes go by it; once all nodes do, shards let go of what is old. A way between two placements is a sequence of
such steps, in each of which a shard loads few bytes and every expert has a home.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from experts.balance import balance_of, shard_loads
from experts.errors import ExpertsMoving
from experts.homes import check_homes, homes_among, loads_between, steps_between, with_homes
from experts.load import RecentLoad
from experts.messages import Homes, Placement, ShardAddress
from experts.placement import housed
from experts.report import ExpertsReport

SLOTS_MIN = 1000  # of load, before anything is concluded from it,
SLOTS_PER_SHARD_MIN = 50  # and so many for each layer and shard: the fullest of many looks full by chance
PAUSE_MAX_S = 3600.0
LATE_STALLS = 10  # times stall_s, after which a shard that could not load is given something again
Solve = Callable[[np.ndarray, tuple[ShardAddress, ...], Homes], Homes]
"""(load [layers, experts], shards, homes in force, which may be none for an expert) to new homes."""


@dataclass(frozen=True, slots=True)
class RebalanceConfig:
    """When experts move: `slowness` is the time of all layers over that of shards evenly loaded."""

    slowness_max: float = 1.15
    gain_min: float = 0.05
    pause_s: float = 30.0
    step_bytes_max: int = 1 << 30
    stall_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a rebalance would do from the placement of an epoch: moves are replicas to load."""

    epoch: int
    first_layer: int
    homes: Homes
    slowness_before: float
    slowness_after: float
    moves_count: int
    bytes_count: int
    fullest_bytes: int
    """What the shard loads that loads most; the others load meanwhile."""
    steps_count: int
    time_s: float | None
    """By how long such a shard took before; None before the first move."""

    @property
    def gain(self) -> float:
        """Share by which all layers become faster."""
        return self.slowness_before / self.slowness_after - 1


@dataclass(slots=True)
class Trial:
    """A rebalance whose promise is not yet proved."""

    before: Homes
    forecast: Forecast
    begin_s: float
    slots_before: np.ndarray | None = None
    """`[layers, shards]` computed when it came into force; None until then."""


class Rebalance:
    """The placement that shards are to load, the one in force, and the steps that are still to come."""

    def __init__(self, config: RebalanceConfig, load: RecentLoad, expert_bytes: int, solve: Solve):
        self.config = config
        self.load = load
        self.solve = solve
        self.placement: Placement | None = None
        self.in_force: Placement | None = None
        self.is_stalled = False
        self.rebalances_count = 0
        self.rollbacks_count = 0
        self.stalls_count = 0
        self._expert_bytes = expert_bytes
        self._steps: deque[Homes] = deque()
        self._given_out_s = 0.0
        self._rest_until_s = 0.0
        self._pause_s = config.pause_s
        self._trial: Trial | None = None
        self._slots: dict[str, np.ndarray] = {}
        self._late: dict[str, tuple[int, float]] = {}
        """What a shard could not load, and when that was seen."""
        self._progress: dict[str, tuple[int, float]] = {}
        self._progress_s: dict[str, float] = {}
        self._bytes_per_s: float | None = None  # of one shard

    @property
    def is_moving(self) -> bool:
        """Whether experts are on their way."""
        return bool(self._steps) or self.placement is not self.in_force

    @property
    def laggards(self) -> Set[str]:
        """Shards that hold nothing in force, and could not load what they were given.

        They are so until they have, or for LATE_STALLS times stall_s.
        """
        return self._late.keys()

    def observe(self, shard: str, totals: np.ndarray | Sequence[Sequence[int]], now_s: float) -> None:
        """Take the load that a shard reports, in slots since it began."""
        self.load.observe(shard, totals, now_s)
        self._slots[shard] = np.asarray(totals, dtype=np.int64).sum(axis=1)

    def get_on(self, shard: str, epoch: int, loaded_share: float, now_s: float) -> None:
        """Take how far a shard has come: after which placement, and with how much of the next.

        Who gets on is slow, and not stuck; who fails again and again where it has failed before is.
        """
        progress = (epoch, loaded_share if loaded_share < 1 else 0.0)
        if progress > self._progress.get(shard, (0, 0.0)):
            self._progress[shard], self._progress_s[shard] = progress, now_s

    def leave(self, shard: str) -> None:
        """A shard has gone; what it computed is still remembered."""
        self.load.leave(shard)
        if self._slots.pop(shard, None) is not None:
            self._trial = None  # the shards are not those that it was begun with
        for known in (self._progress, self._progress_s, self._late):
            known.pop(shard, None)

    def begin(self, placement: Placement, now_s: float) -> None:
        """Give out a first placement, or one that owes nothing to what was before."""
        self._steps.clear()
        self._trial = None
        self._give_out(placement, now_s)

    def go_on_with(self, shards: tuple[ShardAddress, ...], seen_epoch: int, now_s: float) -> None:
        """Shards came or went: re-home at once what has no home left, then go for balance step by step."""
        if self.placement is None:
            raise ValueError("there is no placement to go on from: begin with one")
        self._trial = None
        kept = homes_among(self.placement, shards)
        target = self.solve(self.load.shares(), shards, kept)
        base = with_homes(kept, target)
        if {shard.name for shard in shards} == {shard.name for shard in self.placement.shards}:
            target = base  # nobody came or went: whether to move is for the load to say
        self._steps = deque(steps_between(base, target, self._expert_bytes, self.config.step_bytes_max))
        epoch = 1 + max(self.placement.epoch, seen_epoch)
        self._give_out(Placement(epoch, self.placement.first_layer, shards, base), now_s)

    def forecast(self) -> Forecast:
        """What a rebalance would do now, worth it or not; raises ExpertsMoving before it can be told."""
        self._check_still()
        homes = self.solve(self.load.shares(), self.in_force.shards, self.in_force.homes)
        return self._forecast(homes)

    def move_to(self, homes: Homes, epoch: int, now_s: float) -> Forecast:
        """Rebalance now, from the placement of an epoch; raises ExpertsMoving, or ValueError for a misfit."""
        self._check_still()
        if epoch != self.in_force.epoch:
            raise ValueError(f"the plan is for placement {epoch}, but {self.in_force.epoch} is in force")
        check_homes(homes, self.in_force)
        forecast = self._forecast(homes)
        self._start(forecast, now_s)
        return forecast

    def report(self, problem: str = "") -> ExpertsReport:
        """Numbers about the experts in force."""
        placement, load = self.in_force, self.load.shares()
        homes, shards_count = (placement.homes, len(placement.shards)) if placement else ((), 0)
        loads = shard_loads(load, homes, shards_count)
        return ExpertsReport(
            placement,
            tuple(map(tuple, loads.tolist())),
            tuple(map(tuple, load.tolist())),
            balance_of(loads),
            self.is_moving,
            self.is_stalled,
            self.rebalances_count,
            self.rollbacks_count,
            self.stalls_count,
            problem,
        )

    def advance(self, epochs: Mapping[str, int], nodes_epoch: int, now_s: float) -> None:
        """Go on as far as shards (by name) and nodes have come: `nodes_epoch` is that of the last of them."""
        if self.placement is None:
            return
        since_s = now_s - LATE_STALLS * self.config.stall_s
        self._late = {
            name: (epoch, late_s)
            for name, (epoch, late_s) in self._late.items()
            if epochs.get(name) != epoch and late_s > since_s
        }
        if self.placement is not self.in_force:
            if all(epochs.get(shard.name) == self.placement.epoch for shard in self.placement.shards):
                self._arrive(now_s)
            elif stuck := self._stuck(epochs, now_s):
                self._give_up(stuck, now_s)
        elif nodes_epoch >= self.placement.epoch:
            if self._steps:
                self._give_out(self._next(self._steps.popleft()), now_s)
            elif now_s >= self._rest_until_s:
                self._consider(now_s)

    def _check_still(self) -> None:
        if self.in_force is None or self.is_moving:
            raise ExpertsMoving("experts are on their way; ask again once they have arrived")

    def _arrive(self, now_s: float) -> None:
        self.in_force, self.is_stalled = self.placement, False
        if not self._steps and self._trial is not None:
            self._trial.slots_before = self._computed()
            if self._trial.forecast.fullest_bytes:
                loading_s = max(now_s - self._trial.begin_s, 1e-3)
                self._bytes_per_s = self._trial.forecast.fullest_bytes / loading_s
            self._rest_until_s = now_s + self._pause_s

    def _stuck(self, epochs: Mapping[str, int], now_s: float) -> set[str]:
        """Shards that have not loaded what they were given, and for long have not got on with it."""
        late = {
            shard.name for shard in self.placement.shards if epochs.get(shard.name) != self.placement.epoch
        }
        since_s = self._given_out_s
        return {
            name
            for name in late
            if now_s - max(since_s, self._progress_s.get(name, since_s)) > self.config.stall_s
        }

    def _give_up(self, stuck: set[str], now_s: float) -> None:
        """Some shard does not load: raise the alarm, and go back to what works as far as it is there."""
        self._late |= dict.fromkeys(stuck - self._serving(), (self.placement.epoch, now_s))
        self.stalls_count += 1
        self.is_stalled = True
        self._steps.clear()
        self._trial = None
        self._given_out_s = now_s
        self._rest_until_s = now_s + self._pause_s
        homes = self._homes_without(stuck) if self.in_force else self.placement.homes
        if homes != self.placement.homes:
            self._give_out(self._next(homes), now_s)

    def _serving(self) -> set[str]:
        """Shards that some expert in force has its home on."""
        if self.in_force is None:
            return set()
        homes = {shard for layer in self.in_force.homes for home in layer for shard in home}
        return {self.in_force.shards[shard].name for shard in homes}

    def _homes_without(self, stuck: set[str]) -> Homes:
        """What is in force, on the shards there are; others than `stuck` take what has no home left.

        Nothing moves for balance: a shard would hold what it was given, and still what was to go elsewhere.
        """
        shards = self.placement.shards
        kept = homes_among(self.in_force, shards)
        able = [index for index, shard in enumerate(shards) if shard.name not in stuck]
        if able or all(map(all, kept)):
            return housed(kept, able)
        return self.placement.homes

    def _consider(self, now_s: float) -> None:
        """Judge the last rebalance, then see whether another is worth it."""
        self._rest_until_s = now_s + self._pause_s
        if self._trial is not None:
            if not self._is_proved(self._trial):
                return
            self._trial = None
        if self.load.slots_count < self._slots_min:
            return
        if self._slowness(self.in_force.homes) <= self.config.slowness_max:
            return
        forecast = self.forecast()
        if forecast.gain >= self.config.gain_min:
            self._start(forecast, now_s)

    def _is_proved(self, trial: Trial) -> bool:
        """Whether half of the promised gain was measured; False, and back to before, where it was not."""
        if trial.slots_before is None or trial.forecast.gain < self.config.gain_min:
            return True  # of a person's wish nothing was promised
        slots = self._computed() - trial.slots_before
        if slots.sum() < self._slots_min:
            return False
        measured = balance_of(slots).slowness
        forecast = trial.forecast
        if forecast.slowness_before / measured - 1 >= forecast.gain / 2:
            self._pause_s = self.config.pause_s
            return True
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)  # else the same load would ask for the same again
        self.rollbacks_count += 1
        self._trial = None
        self._go(trial.before)
        return False

    def _start(self, forecast: Forecast, now_s: float) -> None:
        if forecast.homes == self.in_force.homes:
            return
        self.rebalances_count += 1
        self._trial = Trial(self.in_force.homes, forecast, now_s)
        self._go(forecast.homes)

    def _go(self, homes: Homes) -> None:
        limits = (self._expert_bytes, self.config.step_bytes_max)
        self._steps = deque(steps_between(self.in_force.homes, homes, *limits))

    def _forecast(self, homes: Homes) -> Forecast:
        loads = loads_between(self.in_force.homes, homes)
        moves_count = loads.total()
        fullest_bytes = max(loads.values(), default=0) * self._expert_bytes
        limits = (self._expert_bytes, self.config.step_bytes_max)
        return Forecast(
            self.in_force.epoch,
            self.in_force.first_layer,
            homes,
            self._slowness(self.in_force.homes),
            self._slowness(homes),
            moves_count,
            moves_count * self._expert_bytes,
            fullest_bytes,
            sum(1 for _ in steps_between(self.in_force.homes, homes, *limits)),
            fullest_bytes / self._bytes_per_s if self._bytes_per_s else None,
        )

    @property
    def _slots_min(self) -> int:
        shards_count, layers_count = len(self.in_force.shards), len(self.in_force.homes)
        return max(SLOTS_MIN, SLOTS_PER_SHARD_MIN * layers_count * shards_count)

    def _slowness(self, homes: Homes) -> float:
        return balance_of(shard_loads(self.load.shares(), homes, len(self.in_force.shards))).slowness

    def _computed(self) -> np.ndarray:
        """Slots `[layers, shards]` that the shards in force have computed since they began."""
        nothing = np.zeros(len(self.in_force.homes), np.int64)
        return np.stack([self._slots.get(shard.name, nothing) for shard in self.in_force.shards], axis=1)

    def _next(self, homes: Homes) -> Placement:
        before = self.placement
        return Placement(before.epoch + 1, before.first_layer, before.shards, homes)

    def _give_out(self, placement: Placement, now_s: float) -> None:
        self.placement = placement
        self._given_out_s = now_s
