"""Whether `trivium bench` and the cluster's own metrics tell the same: `python -m benchmarks.agreement`.

One local cluster and one workload; the gateway's metrics are read before and after it. What the client sees
holds the way to the gateway and back too, so it is a little more.
"""

import asyncio
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Annotated

import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from cluster.bench.load import plan_load
from cluster.bench.measure import measure
from cluster.bench.report import Report
from cluster.bench.run import Live, prepare, run_workload, warm_up
from cluster.bench.serving import serving
from cluster.bench.settings import LoadSettings
from cluster.client import Client

METRICS_PORT = 50078
TIMEOUT_S = 120.0
TOLD_S = 1.0
RESULTS = Path("benchmarks/results/agreement.json")
TIMES = {"ttft_s": "time_to_first_token", "itl_s": "inter_token", "e2e_s": "end_to_end"}

console = Console()


def scraped() -> dict[str, float]:
    """Every count and sum of the gateway, all labels together."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=10) as response:
        text = response.read().decode()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def compared(
    report: Report, before: dict[str, float], after: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """What the client and the cluster say of each quantity."""

    def risen(name: str) -> float:
        return after[f"trivium_{name}"] - before.get(f"trivium_{name}", 0.0)

    pairs = {
        "requests completed": (report.outcomes.completed, risen("requests_finished_total")),
        "output tokens": (
            report.throughput.output_tokens_per_s * report.throughput.elapsed_s,
            risen("output_tokens_total"),
        ),
    }
    for key, name in TIMES.items():
        server = risen(f"{name}_seconds_sum") / risen(f"{name}_seconds_count")
        pairs[f"mean {key[:-2].upper()}, ms"] = (getattr(report.latency, key).mean * 1e3, server * 1e3)
    return pairs


async def run(load: LoadSettings, folder: Path) -> tuple[Report, dict[str, tuple[float, float]]]:
    """Serve, warm up, measure from both sides."""
    model_folder = Path("examples/trivium-small").resolve()
    config = folder / "agreement.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"folder": str(model_folder)},
                "gateway": {"metrics_port": METRICS_PORT},
                "operations": {"port": 0},
                "dashboard": {"enabled": False},
            }
        )
    )
    async with serving(config) as target, Client(target.address, target.token) as client:
        model = await prepare(client, TIMEOUT_S)
        workload = plan_load(load, model)
        await warm_up(workload, [client], model, TIMEOUT_S)
        await asyncio.sleep(TOLD_S)
        before = await asyncio.to_thread(scraped)
        done = await run_workload(workload, [client], model, TIMEOUT_S, Live(len(workload.requests)))
        await asyncio.sleep(TOLD_S)
        after = await asyncio.to_thread(scraped)
    report = measure("agreement", "", done, 1.0, 0.1)
    return report, compared(report, before, after)


def main(
    rate: Annotated[float, typer.Option(help="requests per second")] = 2.0,
    duration_s: Annotated[float, typer.Option(help="send for so long")] = 30.0,
    scale: Annotated[float, typer.Option(help="size of lengths; 1 is real life")] = 1 / 4,
) -> None:
    """Measure one workload from both sides and print both."""
    with tempfile.TemporaryDirectory() as folder:
        load = LoadSettings(rate_per_s=rate, duration_s=duration_s, scale=scale)
        _, pairs = asyncio.run(run(load, Path(folder)))
    table = Table(title=f"{rate:g} requests/s for {duration_s:g} s")
    for column in ("", "client", "cluster", "client/cluster"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (client, server) in pairs.items():
        table.add_row(name, f"{client:,.1f}", f"{server:,.1f}", f"{client / server:.3f}")
    console.print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(pairs, indent=1))


if __name__ == "__main__":
    typer.run(main)
