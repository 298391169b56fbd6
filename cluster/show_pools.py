"""What the command line draws of pools and requests: who serves, what it hurts, and what was decided."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.proto import trivium_pb2
from cluster.show import as_cell, printable, state_name

BAR_CELLS = 8
DECISIONS_SHOWN = 6
LEVEL_HIGH, LEVEL_FULL = 0.7, 1.0


def pools_view(answer: trivium_pb2.GetPoolsResponse) -> RenderableType:
    """Every pool, and the decisions of late."""
    parts: list[RenderableType] = [pools_table(answer), outlooks(answer)]
    if answer.decisions:
        parts.append(decisions_table(answer.decisions[:DECISIONS_SHOWN]))
    return Group(*parts)


def pools_table(answer: trivium_pb2.GetPoolsResponse) -> Table:
    """Counts, holds and what presses most, a line for each pool."""
    following = "counts follow the load" if answer.is_autoscaled else "counts are set by people"
    table = Table(title=f"pools; {following}", expand=False)
    for column in ("pool", "ready", "aim", "bounds", "pressure", "held"):
        table.add_column(column, no_wrap=column in ("pool", "aim", "bounds"))
    for pool in answer.pools:
        worst = max(pool.pressures, key=lambda one: one.level, default=None)
        table.add_row(
            pool.kind,
            ready_words(pool),
            str(pool.target_count),
            f"{pool.count_min}-{pool.count_max}",
            bar(worst.level, worst.cause) if worst is not None else "",
            f"{pool.hold.count} by {as_cell(pool.hold.by)}" if pool.HasField("hold") else "",
        )
    return table


def outlooks(answer: trivium_pb2.GetPoolsResponse) -> Text:
    """What each pool waits for before its count changes."""
    lines = (f"{pool.kind}: {printable(pool.outlook)}" for pool in answer.pools if pool.outlook)
    return Text("\n".join(lines), style="dim")


def ready_words(pool: trivium_pb2.Pool) -> str:
    """How many serve, and who comes and goes."""
    changes = {
        "starting": pool.starting_count,
        "draining": pool.draining_count,
        "lent": pool.lent_count,
        "borrowed": pool.borrowed_count,
    }
    return ", ".join(
        [str(pool.ready_count), *(f"{count} {word}" for word, count in changes.items() if count)]
    )


def bar(level: float, words: str) -> Text:
    """A share of a limit as a bar, red above it."""
    filled = round(min(max(level, 0.0), 1.0) * BAR_CELLS)
    colour = "red" if level > LEVEL_FULL else "yellow" if level > LEVEL_HIGH else "green"
    text = Text("█" * filled, style=colour)
    text.append("░" * (BAR_CELLS - filled), style="dim")
    return text.append(f" {level:.0%} {printable(words)}".rstrip(), style="default")


def decisions_table(decisions: Sequence[trivium_pb2.ScaleDecision]) -> Table:
    """What was decided, the newest first."""
    table = Table(title="decisions", show_header=False)
    for decision in decisions:
        counts = f"{decision.from_count} → {decision.to_count}"
        table.add_row(f"{ago(decision.age_s)} ago", decision.kind, counts, as_cell(decision.reason))
    return table


def requests_table(answer: trivium_pb2.GetRequestsResponse) -> Table:
    """The requests that have been under way longest."""
    table = Table(title=f"{answer.requests_count} requests under way; the oldest")
    for column in ("request", "phase", "age", "in", "out", "tries", "prefill", "decode"):
        table.add_column(column, no_wrap=True)
    for request in answer.requests:
        table.add_row(
            as_cell(request.request_id[:8]),
            request.phase,
            ago(request.age_s),
            str(request.prompt_tokens_count),
            str(request.output_tokens_count),
            str(1 + request.attempts_count),
            as_cell(request.prefill.removeprefix("prefill-")),
            as_cell(request.decode.removeprefix("decode-")),
        )
    return table


def pages_table(cluster: trivium_pb2.GetClusterResponse) -> Table:
    """Each node's pages as a bar, with what it does."""
    table = Table(title="nodes", padding=(0, 1, 0, 0))  # so that 80 columns are enough
    for column in ("node", "state", "runs", "waits", "leased", "cached", "pages", "tokens/s"):
        table.add_column(column, no_wrap=column != "node")
    for node in cluster.nodes:
        total_count = node.pages_total_count
        table.add_row(
            as_cell(node.name),
            state_name(node.state),
            str(node.requests_running_count),
            str(node.requests_waiting_count),
            bar(node.pages_leased_count / total_count, "") if total_count else "",
            f"{node.pages_cached_count / total_count:.0%}" if total_count else "",
            str(total_count) if total_count else "",
            f"{node.tokens_per_s:.0f}" if total_count else "",
        )
    return table


def ago(age_s: float) -> str:
    """A time as people say it."""
    if age_s < 100:
        return f"{age_s:.1f} s" if age_s < 10 else f"{age_s:.0f} s"
    return f"{age_s / 60:.0f} min" if age_s < 6000 else f"{age_s / 3600:.1f} h"
