"""How evenly experts are placed, how fast, and what moves under drift: `python -m benchmarks.placement`.

58 layers of 256 experts, as in DeepSeek-V3. Balance is the slowest shard's time over the mean shard's, beside
what no placement can go below. One core; nothing of the cluster runs.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from experts.solve_placement import Plan, ShardRoom, solve_placement, warm_up

LAYERS, EXPERTS, GROUPS = 58, 256, 8
SEED = 20
SIZES = ((32, 256, 4), (32, 288, 4), (32, 320, 4), (144, 256, 18), (144, 288, 18), (144, 320, 18))
DRIFT_SIZES = ((32, 288, 4), (144, 288, 18), (144, 320, 18))
ROUNDS = 5
DRIFT_STEPS = 8
DRIFT_SIGMA = 0.05  # of every expert's load, at every step
HOT_SWAPS_SHARE = (
    0.25  # of layers in which, at a step, two of the hottest experts change place with any others
)
BOUND_LAYERS = 6
BOUND_GRID = 1024
RESULTS = Path("benchmarks/results/placement.json")

console = Console(width=max(Console().width, 125))


def main(output: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS) -> None:
    """Measure everything and print two tables."""
    warm_up()
    figures = {
        "plans": [plan_figures(*size, kind) for size in SIZES for kind in loads()],
        "drift": [
            drift_figures(*size, kind)
            for size in DRIFT_SIZES
            for kind in ("lognormal", "zipf 0.6", "zipf 1.2")
        ],
    }
    title = "58 layers of 256 experts: time of the slowest shard over the mean shard's, mean / worst layer"
    show([compact(plan) for plan in figures["plans"]], title)
    show(figures["drift"], f"under drift, {DRIFT_STEPS} rebalances")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")


def loads() -> dict[str, np.ndarray]:
    """Tokens [layers, experts] of each kind, an expert's rank being chance."""
    rng = np.random.default_rng(SEED)
    ranks = np.arange(1.0, EXPERTS + 1)
    kinds = {"lognormal": rng.lognormal(0, 1, (LAYERS, EXPERTS))}
    for exponent in (0.3, 0.6, 0.9, 1.2):
        kinds[f"zipf {exponent}"] = np.stack([rng.permutation(ranks**-exponent) for _ in range(LAYERS)])
    return kinds


def rooms_of(shards_count: int, slots_count: int, hosts_count: int) -> list[ShardRoom]:
    """Neighbouring shards on one host; the first have one slot more where slots do not come out even."""
    return [
        ShardRoom(
            f"host-{shard * hosts_count // shards_count}",
            slots_count // shards_count + (shard < slots_count % shards_count),
        )
        for shard in range(shards_count)
    ]


def plan_figures(shards_count: int, slots_count: int, hosts_count: int, kind: str) -> dict:
    """Fresh plans of one kind of load: at once, with tries, and with groups kept to hosts."""
    load, rooms = loads()[kind], rooms_of(shards_count, slots_count, hosts_count)
    quick, quick_ms = timed(lambda: solve_placement(load, rooms, tries_max=0))
    tried, tried_ms = timed(lambda: solve_placement(load, rooms))
    figures = {"shards": shards_count, "slots": slots_count, "load": kind} | balance(quick)
    figures |= {"bound": rounded(mean(quick.time_bounds)), "over bound": over_bound(quick)}
    figures |= {"best ms": min(quick_ms), "median ms": rounded(median(quick_ms))}
    figures |= {f"{name}, tries": figure for name, figure in balance(tried).items()}
    figures |= {"over bound, tries": over_bound(tried), "median ms, tries": rounded(median(tried_ms))}
    if slots_count % shards_count == 0:
        figures["over the pigeons' bound"] = over_pigeons(
            tried, load, shards_count, slots_count // shards_count
        )
    if slots_count // hosts_count >= EXPERTS // GROUPS:
        grouped, grouped_ms = timed(lambda: solve_placement(load, rooms, groups_count=GROUPS))
        figures |= {f"{name}, groups": figure for name, figure in balance(grouped).items()}
        figures["groups kept"] = rounded(grouped.groups_kept_count / (LAYERS * GROUPS))
        figures["median ms, groups"] = rounded(median(grouped_ms))
    return figures


def drift_figures(shards_count: int, slots_count: int, hosts_count: int, kind: str) -> dict:
    """Rebalance after rebalance while load drifts: what moves, and how far from fresh plans it ends."""
    rng = np.random.default_rng(SEED)
    load, rooms = loads()[kind], rooms_of(shards_count, slots_count, hosts_count)
    plan = solve_placement(load, rooms)
    moved, beside_fresh, spent_ms = [], [], []
    for _ in range(DRIFT_STEPS):
        load = drifted(load, rng)
        fresh = solve_placement(load, rooms)
        begin = time.perf_counter()
        plan = solve_placement(load, rooms, plan.homes)
        spent_ms.append(rounded(1e3 * (time.perf_counter() - begin)))
        moved.append(sum(plan.moves_counts) / plan.replicas_count)
        beside_fresh += [ours / theirs for ours, theirs in zip(plan.times, fresh.times, strict=True)]
    return {
        "shards": shards_count,
        "slots": slots_count,
        "load": kind,
        "moved": rounded(mean(moved)),
        "moved, worst call": rounded(max(moved)),
        "over fresh": rounded(mean(beside_fresh)),
        "over fresh, worst layer": rounded(max(beside_fresh)),
        "median ms": rounded(median(spent_ms)),
    }


def drifted(load: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every expert a little more or less popular, and here and there a new favourite."""
    load = load * rng.lognormal(0, DRIFT_SIGMA, load.shape)
    for tokens in load[rng.random(len(load)) < HOT_SWAPS_SHARE]:
        for hot in rng.choice(np.argsort(-tokens)[:64], 2, replace=False):
            other = rng.integers(EXPERTS)
            tokens[[hot, other]] = tokens[[other, hot]]
    return load


def timed(solve: Callable[[], Plan]) -> tuple[Plan, list[float]]:
    """A plan and how many milliseconds it took, several times; fewer where it takes long."""
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) < 1000:
        begin = time.perf_counter()
        plan = solve()
        times.append(rounded(1e3 * (time.perf_counter() - begin)))
    return plan, times


def balance(plan: Plan) -> dict[str, float]:
    """Mean and worst layer."""
    return {"mean": rounded(mean(plan.times)), "worst": rounded(max(plan.times))}


def over_bound(plan: Plan) -> float:
    """Time over bound, mean of the layers."""
    return rounded(mean(ours / bound for ours, bound in zip(plan.times, plan.time_bounds, strict=True)))


def over_pigeons(plan: Plan, load: np.ndarray, shards_count: int, slots_each: int) -> float:
    """Time over the sharper bound, mean of the first layers."""
    known = zip(plan.time_bounds, plan.times, strict=True)
    sharper = [
        pigeons_bound(tokens, shards_count, slots_each, *reached)
        for tokens, reached in zip(load[:BOUND_LAYERS], known, strict=False)
    ]
    return rounded(mean(ours / bound for ours, bound in zip(plan.times, sharper, strict=False)))


def pigeons_bound(tokens: np.ndarray, shards_count: int, slots_each: int, low: float, high: float) -> float:
    """What no placement on equal shards can go below, by bisection between a bound and a time reached."""
    units = tokens / tokens.sum() * shards_count
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if cannot_be(units, shards_count, slots_each, middle) else (low, middle)
    return low


def cannot_be(units: np.ndarray, shards_count: int, slots_each: int, limit: float) -> bool:
    """Proof that no placement keeps every shard to `limit`; False where there is none of this kind.

    For any size x, a shard with a replica beyond `limit - x` holds no other of x or more: the large one takes
    up the whole shard, others of x or more take a slot each, smaller ones none. Every expert may choose what
    takes up least, at a price for replicas that it does not need, of which there are only so many.
    """
    needed = np.maximum(np.ceil(units / limit - 1e-12), 1)
    slots_count = shards_count * slots_each
    spare = slots_count - needed.sum()
    if spare < 0 or needed.max() > shards_count:
        return True
    size = np.linspace(0, limit / 2, BOUND_GRID + 1)[1:, None]
    large = (
        np.where(units / needed > limit - size, slots_each, np.where(units / needed >= size, 1, 0)) * needed
    )
    to_middle = np.maximum(np.ceil(units / (limit - size)), needed)
    middle = np.where(units / to_middle >= size, to_middle, 0)
    to_small = np.maximum(np.floor(units / size) + 1, needed)
    for price in (0.0, 0.25, 0.5, 1.0, 2.0):
        least = np.minimum(large, middle + price * (to_middle - needed))
        least = np.minimum(least, price * (to_small - needed))
        if (least.sum(axis=1) - price * spare > slots_count + 1e-6).any():
            return True
    return False


def rounded(figure: float) -> float:
    """To four places after the point."""
    return round(float(figure), 4)


def compact(figures: dict) -> dict[str, object]:
    """A plan's figures as a person reads them, with the milliseconds of each way to solve."""
    row: dict[str, object] = {name: figures[name] for name in ("shards", "slots", "load", "bound")}
    for title, suffix in (("at once", ""), ("tries", ", tries"), ("groups", ", groups")):
        if f"mean{suffix}" in figures:
            row[title] = f"{figures[f'mean{suffix}']:.3f}/{figures[f'worst{suffix}']:.3f}"
            row[f"{title} ms"] = f"{figures[f'median ms{suffix}']:.1f}"
    return row


def show(rows: list[dict], title: str) -> None:
    """One table, a column for each figure that any row has."""
    columns = dict.fromkeys(name for row in rows for name in row)
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
