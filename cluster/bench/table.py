"""The numbers of reports side by side: rows of words, for the screen and for the page alike."""

from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.table import Table

from cluster.bench.report import Report, Spread

LATENESS_S_MAX = 0.02  # at p99; above, the load generator itself is what was measured
Cell = Callable[[Report], str]


def rows(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    """What was measured, each with its value in every report."""
    table = [(name, [cell(report) for report in reports]) for name, cell in CELLS]
    priorities = {key for report in reports for key in report.latency.ttft_s_by_priority}
    if len(priorities) > 1:
        for key in sorted(priorities, key=int, reverse=True):
            values = [seconds(report.latency.ttft_s_by_priority.get(key)) for report in reports]
            table.append((f"TTFT at priority {key}", values))
    return [(name, cells) for name, cells in table if any(cells)]


def as_table(reports: Sequence[Report]) -> Table:
    """The rows for the screen."""
    table = Table(title="mean · p50 · p90 · p99 · max where five numbers stand", title_justify="left")
    table.add_column("")
    for report in reports:
        table.add_column(escape(report.name), overflow="fold")
    for name, cells in rows(reports):
        table.add_row(name, *map(escape, cells))
    return table


def warnings(reports: Sequence[Report]) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = []
    for report in reports:
        lateness, offer = report.sender.lateness_s, report.offer
        if lateness is not None and lateness.p99 > LATENESS_S_MAX:
            late = f"requests were sent up to {lateness.p99 * 1e3:.0f} ms late (p99)"
            why = "the load generator had too little CPU, and latencies include it"
            said.append(f"{report.name}: {late}: {why}.")
        if offer.cut_count:
            cut = f"{offer.cut_count} of {offer.planned_count} requests were cut to the model's context"
            said.append(f"{report.name}: {cut}; a smaller --scale keeps their shape.")
        said += [f"{report.name}: {note}" for note in offer.notes]
        if report.was_interrupted:
            said.append(f"{report.name}: interrupted; requests in flight count as cancelled.")
    return said


def lengths(spread: Spread | None) -> str:
    """A distribution of tokens."""
    return "" if spread is None else five(spread, 1.0, "")


def seconds(spread: Spread | None) -> str:
    """A distribution of times, in a unit that suits its middle."""
    if spread is None:
        return ""
    return five(spread, 1.0, " s") if spread.p50 >= 1 else five(spread, 1e3, " ms")


def five(spread: Spread, factor: float, unit: str) -> str:
    """mean, p50, p90, p99 and max."""
    numbers = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    return " · ".join(short(number * factor) for number in numbers) + unit


def short(number: float) -> str:
    """A number in three digits or, if larger, whole."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def share(value: float | None) -> str:
    """A share of one as a percentage."""
    return "" if value is None else f"{value:.1%}"


def ends(report: Report) -> str:
    """Requests that did not complete, by how they ended."""
    ended = report.outcomes
    counts = {
        "shed": ended.shed,
        "expired": ended.expired,
        "cancelled": ended.cancelled,
        "failed": ended.failed,
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def goodput(report: Report) -> str:
    """Requests within both bounds."""
    good = report.goodput
    return f"{share(good.share)} of offered, {short(good.good_per_s)} requests/s"


def bounds(report: Report) -> str:
    """The service level asked for."""
    good = report.goodput
    return f"TTFT {short(good.slo_ttft_s * 1e3)} ms, mean ITL {short(good.slo_itl_s * 1e3)} ms"


def requests(report: Report) -> str:
    """Counts and rate of what was offered."""
    offer = report.offer
    return f"{report.outcomes.offered} in {short(offer.duration_s)} s ({short(offer.offered_per_s)}/s)"


def done(report: Report) -> str:
    """Counts and rate of what was completed."""
    elapsed_s, per_s = report.throughput.elapsed_s, report.throughput.completed_per_s
    return f"{report.outcomes.completed} in {short(elapsed_s)} s ({short(per_s)}/s)"


def reasons(report: Report) -> str:
    """Why requests did not complete."""
    return ", ".join(f"{count} × {reason}" for reason, count in report.outcomes.reasons.items())


CELLS: tuple[tuple[str, Cell], ...] = (
    ("requests offered", requests),
    ("requests completed", done),
    ("not completed", ends),
    ("why", reasons),
    ("service level", bounds),
    ("goodput", goodput),
    ("TTFT", lambda report: seconds(report.latency.ttft_s)),
    ("ITL", lambda report: seconds(report.latency.itl_s)),
    ("end to end", lambda report: seconds(report.latency.e2e_s)),
    ("output tokens/s", lambda report: short(report.throughput.output_tokens_per_s)),
    ("prompt tokens/s", lambda report: short(report.throughput.prompt_tokens_per_s)),
    ("prompt tokens in cache", lambda report: share(report.throughput.prefix_cached_share)),
    ("prompt tokens", lambda report: lengths(report.offer.prompt_tokens)),
    ("output tokens asked", lambda report: lengths(report.offer.output_tokens)),
    ("cluster: queued", lambda report: seconds(report.server.queued_s)),
    ("cluster: prefill", lambda report: seconds(report.server.prefill_s)),
    ("cluster: transfer", lambda report: seconds(report.server.transfer_s)),
    ("cluster: decode", lambda report: seconds(report.server.decode_s)),
    ("cluster: total", lambda report: seconds(report.server.total_s)),
    ("sent late by", lambda report: seconds(report.sender.lateness_s)),
)
