"""What the command line draws of experts: heat maps of load by layer and shard, and plans."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.proto import trivium_pb2
from cluster.show import as_cell

COLD, EVEN, HOT = (38, 70, 150), (60, 60, 60), (200, 40, 30)
HEAT_MAX = 2.0  # times a layer's mean, at which a cell is as red as can be


def experts_view(experts: trivium_pb2.GetExpertsResponse) -> RenderableType:
    """The heat map, and in words how even the load is and what moves."""
    return Group(heat_map(experts), Text(summary(experts)))


def heat_map(experts: trivium_pb2.GetExpertsResponse) -> Table:
    """Each shard's load in each layer, as times the layer's mean."""
    table = Table(title=f"load of each shard over its layer's mean; placement {experts.placement_epoch}")
    table.add_column("layer", justify="right")
    for shard in experts.shards:
        table.add_column(as_cell(shard), justify="right")
    table.add_column("replicas", justify="right")
    for layer in experts.layers:
        mean = sum(layer.shard_shares) / max(len(layer.shard_shares), 1)
        cells = [cell(share / mean if mean else 0.0, mean > 0) for share in layer.shard_shares]
        table.add_row(str(layer.layer), *cells, str(sum(len(home.shards) for home in layer.homes)))
    return table


def cell(times: float, known: bool) -> Text:
    """One number on the colour of its heat; a layer of which nothing is known stays dark."""
    if not known:
        return Text("-", style="dim")
    red, green, blue = colour_of(times)
    return Text(f" {times:.2f} ", style=f"white on rgb({red},{green},{blue})")


def colour_of(times: float) -> tuple[int, int, int]:
    """Blue below the mean, grey at it, red above."""
    end, share = (COLD, 1 - times) if times < 1 else (HOT, (times - 1) / (HEAT_MAX - 1))
    share = min(max(share, 0.0), 1.0)
    return tuple(round(even + (other - even) * share) for even, other in zip(EVEN, end, strict=True))


def summary(experts: trivium_pb2.GetExpertsResponse) -> str:
    """How even the load is in the three conventions, and what has moved."""
    balance = experts.balance
    lines = [
        f"balance: mean/max {balance.mean_over_max:.3f}, sum of means / sum of maxima "
        f"{balance.means_over_maxes:.3f}, (max - mean)/mean {balance.excess:.3f}",
        f"{experts.rebalances_count} rebalances, {experts.rollbacks_count} rolled back, "
        f"{experts.stalls_count} stalled; {state_of(experts)}",
    ]
    if experts.problem:
        lines.append(f"problem: {experts.problem}")
    return "\n".join(lines)


def state_of(experts: trivium_pb2.GetExpertsResponse) -> str:
    """What is going on, in a few words."""
    if experts.is_stalled:
        return "STALLED: a shard does not load its experts"
    return "experts are moving" if experts.is_moving else "nothing moves"


def plan_table(plan: trivium_pb2.ExpertsPlan) -> Table:
    """What a plan would bring, and what it would take."""
    table = Table(show_header=False)
    gain = plan.slowness_before / plan.slowness_after - 1 if plan.slowness_after else 0.0
    rows: Sequence[tuple[str, str]] = (
        ("time of all layers over even shards", f"{plan.slowness_before:.3f} -> {plan.slowness_after:.3f}"),
        ("expected gain", f"{gain:.1%}"),
        ("replicas to load", str(plan.moves_count)),
        ("bytes", f"{plan.bytes_count / 2**20:.1f} MiB in {plan.steps_count} steps"),
        (
            "time",
            f"about {plan.time_s:.1f} s" if plan.HasField("time_s") else "not known before a first move",
        ),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table
