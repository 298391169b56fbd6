"""Pictures of reports: eight panels, every run in a colour of its own that colour-blind people can tell."""

import io
from collections.abc import Callable, Sequence
from itertools import chain

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cluster.bench.report import Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
SLO_COLOUR = "#555555"
SIZE_INCHES = (13.0, 14.5)
DPI = 110
NAME_CHARACTERS_MAX = 32
LEAST = 1e-6  # what a logarithmic axis shows of nothing
DECADES_MARKED_MAX = 3.5
HEADROOM = 0.35  # above the highest value, for the legend
STYLE = {
    "text.parse_math": False,  # names may hold a dollar
    "svg.hashsalt": "trivium",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


def as_png(reports: Sequence[Report]) -> bytes:
    """The picture as a PNG file."""
    with rc_context(STYLE):
        figure, file = draw(reports), io.BytesIO()
        FigureCanvasAgg(figure).print_png(file)
        return file.getvalue()


def as_svg(reports: Sequence[Report]) -> bytes:
    """The picture as an SVG file."""
    with rc_context(STYLE):
        figure, file = draw(reports), io.BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
        return file.getvalue()


def draw(reports: Sequence[Report]) -> Figure:
    """Every panel; call it within `STYLE`."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    panels = figure.subplots(4, 2)
    draws: tuple[Callable[[Axes, Sequence[Report]], None], ...] = (
        draw_requests,
        draw_in_flight,
        draw_ttft,
        draw_itl,
        draw_ttft_shares,
        draw_itl_shares,
        draw_tokens,
        draw_e2e_shares,
    )
    for axes, draw_one in zip(panels.flat, draws, strict=True):
        draw_one(axes, reports)
    figure.suptitle(title(reports), fontsize=13, fontweight="bold")
    return figure


def title(reports: Sequence[Report]) -> str:
    """What was run, in a line."""
    offer = reports[0].offer
    against = " against ".join(safe(report.name) for report in reports)
    return f"trivium bench: {safe(offer.name)}, {offer.offered_per_s:.3g} requests/s, {against}"


def safe(name: str) -> str:
    """A name of the caller's as any font can write it and any legend shows it."""
    plain = "".join(character if " " <= character <= "~" else "?" for character in name).lstrip("_ ")
    return (plain if len(plain) <= NAME_CHARACTERS_MAX else plain[: NAME_CHARACTERS_MAX - 2] + "..") or "?"


def draw_requests(axes: Axes, reports: Sequence[Report]) -> None:
    """Offered against completed: where the two part, the cluster is behind."""
    widest = max(reports, key=lambda report: len(report.seconds.offered))
    axes.stairs(*steps(widest, "offered"), fill=True, color="#DDDDDD", label="offered")
    for report, colour in zip(reports, COLOURS, strict=False):
        axes.stairs(*steps(report, "completed"), color=colour, label=label(reports, report, "completed"))
        if any(report.seconds.not_completed):
            lost = label(reports, report, "not completed")
            axes.stairs(*steps(report, "not_completed"), color=colour, linestyle=":", label=lost)
    finish_over_time(axes, reports, "Requests offered and completed", "requests/s")


def draw_in_flight(axes: Axes, reports: Sequence[Report]) -> None:
    """Requests sent and not ended."""
    for report, colour in zip(reports, COLOURS, strict=False):
        values, borders = report.seconds.in_flight, steps(report, "in_flight")[1]
        axes.stairs(values, borders, color=colour, label=label(reports, report, "in flight"))
        axes.stairs(values, borders, color=colour, alpha=0.12, fill=True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    finish_over_time(axes, reports, "Requests in flight, most at once", "requests")


def draw_tokens(axes: Axes, reports: Sequence[Report]) -> None:
    """Tokens that reached the client."""
    for report, colour in zip(reports, COLOURS, strict=False):
        values, borders = steps(report, "output_tokens")
        axes.stairs(values, borders, color=colour, label=label(reports, report, "output tokens"))
        axes.stairs(values, borders, color=colour, alpha=0.12, fill=True)
    finish_over_time(axes, reports, "Output tokens", "tokens/s")


def draw_ttft(axes: Axes, reports: Sequence[Report]) -> None:
    """Time to first token by when the token came."""
    slo = reports[0].goodput.slo_ttft_s
    draw_band(axes, reports, "ttft", 1.0, slo)
    draw_slo(axes.axhline, slo, "s")
    finish_over_time(axes, reports, "Time to first token over time", "TTFT (s)")


def draw_itl(axes: Axes, reports: Sequence[Report]) -> None:
    """Inter-token latency by when the token came."""
    slo = reports[0].goodput.slo_itl_s * 1e3
    draw_band(axes, reports, "itl", 1e3, slo)
    draw_slo(axes.axhline, slo, "ms, of a request's mean")
    finish_over_time(axes, reports, "Inter-token latency over time", "ITL (ms)")


def draw_band(axes: Axes, reports: Sequence[Report], quantity: str, factor: float, slo: float) -> None:
    """p50 as a line, p99 as a dashed one where there were tokens enough, and what lies between."""
    values = [
        value
        for report in reports
        for name in ("p50", "p99")
        for value in positive(report, f"{quantity}_{name}_s", factor)
    ]
    axes.set_yscale("log")
    axes.set_ylim(log_limits([*values, slo]))
    for report, colour in zip(reports, COLOURS, strict=False):
        low, high = (positive(report, f"{quantity}_{name}_s", factor) for name in ("p50", "p99"))
        times = [(index + 0.5) * report.seconds.width_s for index in range(len(low))]
        axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
        mark = {"color": colour, "marker": "o", "markersize": 2.5}
        axes.plot(times, low, label=label(reports, report, "p50"), **mark)
        if any(value == value for value in high):
            axes.plot(times, high, linestyle="--", label=label(reports, report, "p99"), **mark)


def draw_ttft_shares(axes: Axes, reports: Sequence[Report]) -> None:
    """How many requests had their first token by when."""
    slo = reports[0].goodput.slo_ttft_s
    draw_shares(axes, reports, "ttft_s", 1.0, [slo])
    draw_slo(axes.axvline, slo, "s")
    finish_shares(axes, "Time to first token", "TTFT (s)", "answered requests")


def draw_itl_shares(axes: Axes, reports: Sequence[Report]) -> None:
    """How many tokens came how soon after the one before."""
    slo = reports[0].goodput.slo_itl_s * 1e3
    draw_shares(axes, reports, "itl_s", 1e3, [slo])
    draw_slo(axes.axvline, slo, "ms, of a request's mean")
    finish_shares(axes, "Inter-token latency", "ITL (ms)", "tokens")


def draw_e2e_shares(axes: Axes, reports: Sequence[Report]) -> None:
    """How many requests were done by when."""
    draw_shares(axes, reports, "e2e_s", 1.0, [])
    finish_shares(axes, "End to end", "due to end (s)", "completed requests")


def draw_shares(
    axes: Axes, reports: Sequence[Report], quantity: str, factor: float, also: Sequence[float]
) -> None:
    """A cumulative distribution on a logarithmic axis that shows `also` those values."""
    lines = [
        [max(value * factor, LEAST) for value in getattr(report.quantiles, quantity)] for report in reports
    ]
    axes.set_xscale("log")
    axes.set_xlim(log_limits([*chain(*lines), *also]))
    for report, values, colour in zip(reports, lines, COLOURS, strict=False):
        shares = [index / (len(values) - 1) for index in range(len(values))]
        axes.plot(values, shares, color=colour, label=label(reports, report, "measured"))


def draw_slo(line: Callable[..., object], bound: float, unit: str) -> None:
    """The bound that a good request keeps."""
    line(bound, color=SLO_COLOUR, linestyle="-.", linewidth=1.2, label=f"SLO {bound:g} {unit}")


def steps(report: Report, quantity: str) -> tuple[list[float], list[float]]:
    """A count in each bucket, as a rate unless it is a level, and where buckets begin and end."""
    seconds = report.seconds
    per = 1.0 if quantity == "in_flight" else seconds.width_s
    values = [count / per for count in getattr(seconds, quantity)]
    return values, [index * seconds.width_s for index in range(len(values) + 1)]


def positive(report: Report, quantity: str, factor: float) -> list[float]:
    """A latency in each bucket as a logarithmic axis bears it; NaN in empty ones."""
    values = getattr(report.seconds, quantity)
    return [float("nan") if value is None else max(value * factor, LEAST) for value in values]


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    """A logarithmic axis with room beside the values, of which NaN are none."""
    there = [value for value in values if value == value]
    return (min(there) / 1.3, max(there) * 1.3) if there else (0.001, 1.0)


def label(reports: Sequence[Report], report: Report, quantity: str) -> str:
    """What a line shows and, if there are several, of which run."""
    return quantity if len(reports) == 1 else f"{safe(report.name)}: {quantity}"


def finish_over_time(axes: Axes, reports: Sequence[Report], heading: str, up: str) -> None:
    """Names and limits of a panel over time; all such panels span the same time."""
    axes.set(title=heading, xlabel="time (s)", ylabel=up)
    axes.set_xlim(0, max(len(report.seconds.offered) * report.seconds.width_s for report in reports))
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(top=high * (high / low) ** HEADROOM)
        mark_decades(axes.yaxis, low, high)
    else:
        axes.set_ylim(0, high * (1 + HEADROOM))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="upper left", ncols=2)


def finish_shares(axes: Axes, heading: str, across: str, of: str) -> None:
    """Names and limits of a panel of shares."""
    axes.set(title=heading, xlabel=across, ylabel=f"share of {of}", ylim=(0, 1.03))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    mark_decades(axes.xaxis, *axes.get_xlim())
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="best")


def mark_decades(axis: Axis, low: float, high: float) -> None:
    """Write numbers at 1, 2 and 5, or at 1 alone where there are many decades."""
    few = high <= low * 10**DECADES_MARKED_MAX
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=30))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
