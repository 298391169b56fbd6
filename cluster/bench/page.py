"""Reports as files: a page that needs nothing from outside, a picture, or JSON."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cluster.bench.picture import as_png, as_svg
from cluster.bench.report import Report, to_json
from cluster.bench.settings import refused
from cluster.bench.table import rows, warnings

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222 }}
body {{ max-width: 1240px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem; margin-bottom: 0 }}
p.when {{ color: #666; margin-top: 0.2rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ text-align: left; vertical-align: top }}
th, td {{ padding: 0.25rem 1rem 0.25rem 0; border-bottom: 1px solid #ddd }}
td {{ font-variant-numeric: tabular-nums }}
p.warning {{ background: #fff4d6; border-left: 4px solid #e69f00; padding: 0.4rem 0.8rem }}
img {{ width: 100%; height: auto }}
footer {{ color: #666; font-size: 0.9rem }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="when">{when}</p>
{warnings}
<table>
<thead><tr><th></th>{names}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<img alt="Requests, latencies and tokens over time, and how latencies are distributed"
 src="data:image/svg+xml;base64,{picture}">
<footer>Five numbers are mean · p50 · p90 · p99 · max. Goodput counts over all requests offered.
Rows that begin with cluster are the cluster's own account of completed requests;
all others are what the client saw.</footer>
</body>
</html>
"""


def write(path: Path, reports: Sequence[Report]) -> None:
    """Write reports as the file's ending says; raises InvalidRequest where that cannot be."""
    try:
        if path.suffix == ".html":
            path.write_text(as_html(reports), encoding="utf-8")
        elif path.suffix == ".png":
            path.write_bytes(as_png(reports))
        else:
            path.write_text(to_json(reports) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise refused("--output", message, "a file that can be written", "Name another.") from error


def as_html(reports: Sequence[Report]) -> str:
    """A page of its own; whatever names hold, it is text there."""
    offer = reports[0].offer
    told = [f'<p class="warning">{escape(warning)}</p>' for warning in warnings(reports)]
    return PAGE.format(
        title=escape(f"trivium bench: {offer.name}, seed {offer.seed}"),
        when=escape(", ".join(f"{report.name} began {report.started_at}" for report in reports)),
        warnings="\n".join(told),
        names="".join(f"<th>{escape(report.name)}</th>" for report in reports),
        rows="\n".join(as_row(name, cells) for name, cells in rows(reports)),
        picture=base64.b64encode(as_svg(reports)).decode(),
    )


def as_row(name: str, cells: Sequence[str]) -> str:
    """One row of the table."""
    return f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
