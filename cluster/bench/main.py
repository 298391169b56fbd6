"""The process of `trivium bench`: `python -m cluster.bench.main SETTINGS_JSON`.

One of its own, since drawing needs a library that the other commands need not wait for.
"""

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from datetime import UTC, datetime
from functools import partial

import typer
from rich.console import Console
from rich.markup import escape

from cluster.bench.load import plan_load
from cluster.bench.measure import measure
from cluster.bench.page import write
from cluster.bench.progress import progress_of
from cluster.bench.report import Report, to_json
from cluster.bench.run import Live, prepare, run_workload, warm_up
from cluster.bench.serving import Target, serving
from cluster.bench.settings import BenchSettings, from_json, refused
from cluster.bench.table import as_table, warnings
from cluster.bench.trace import plan_trace
from cluster.bench.workload import ModelLimits, Workload
from cluster.cli_options import told
from cluster.client import Client
from cluster.token_file import read_token

INTERRUPTED_STATUS = 130
Opening = Callable[[], AbstractAsyncContextManager[Target]]

console = Console()
aside = Console(stderr=True)


async def bench(
    settings: BenchSettings, targets: Sequence[tuple[str, Opening]], reports: list[Report]
) -> None:
    """Run one workload against one cluster after the other, adding a report of each; raises TriviumError.

    A cancellation ends the run there is, which is still reported, and leaves out the rest.
    """
    workload = None
    for name, opening in targets:
        try:
            async with opening() as target:
                report, workload = await bench_one(name, target, settings, workload)
                reports.append(report)
        except asyncio.CancelledError:
            if not reports:
                raise
            asyncio.current_task().uncancel()
            break
        if report.was_interrupted:
            break


async def bench_one(
    name: str, target: Target, settings: BenchSettings, before: Workload | None
) -> tuple[Report, Workload]:
    """Run a workload, that of the run before if there was one, against one cluster."""
    async with AsyncExitStack() as stack:
        connections = (Client(target.address, target.token) for _ in range(settings.connections_count))
        clients = [await stack.enter_async_context(client) for client in connections]
        model = await prepare(clients[0], settings.timeout_s)
        workload = plan(settings, model)
        if before is not None and workload != before:
            message = f"the model of {name} has another context than the one before"
            raise refused(
                "CONFIG", message, "models that can be sent the same requests", "Compare like with like."
            )
        await warm_up(workload, clients, model, settings.timeout_s)
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        live = Live(len(workload.requests))
        async with progress_of(name, live, aside):
            run = await run_workload(workload, clients, model, settings.timeout_s, live)
    return measure(name, started_at, run, settings.slo_ttft_s, settings.slo_itl_s), workload


def plan(settings: BenchSettings, model: ModelLimits) -> Workload:
    """The workload that settings ask for; raises InvalidRequest."""
    load = settings.load
    return plan_trace(load.trace, load, model) if load.trace is not None else plan_load(load, model)


def targets_of(settings: BenchSettings) -> list[tuple[str, Opening]]:
    """What to run against, by name: a cluster for each configuration, or the one at the address."""
    if not settings.configs:
        target = Target(settings.address, read_token(settings.token_file, "--token-file"))
        return [(settings.address, partial(nullcontext, target))]
    stems = [config.stem for config in settings.configs]
    names = stems if len(set(stems)) == len(stems) else list(map(str, settings.configs))
    return [(name, partial(serving, config)) for name, config in zip(names, settings.configs, strict=True)]


def show(settings: BenchSettings, reports: Sequence[Report]) -> None:
    """Reports on the screen and in the files asked for."""
    if settings.json_output:
        print(to_json(reports))
    else:
        console.print(as_table(reports))
    for warning in warnings(reports):
        aside.print(f"[yellow]note[/] {escape(warning)}", soft_wrap=True, highlight=False)
    for output in settings.outputs:
        write(output, reports)
        aside.print(f"wrote {escape(str(output))}", soft_wrap=True, highlight=False)


def status_of(reports: Sequence[Report], left_out: Sequence[str]) -> int:
    """How the process ends: 130 if interrupted in or before a run, 1 if a cluster completed nothing."""
    if left_out or any(report.was_interrupted for report in reports):
        return INTERRUPTED_STATUS
    return 0 if all(report.outcomes.completed for report in reports) else 1


async def bench_until_told(
    settings: BenchSettings, targets: Sequence[tuple[str, Opening]], reports: list[Report]
) -> None:
    """Run it all; whatever ends this process early ends the clusters that it started."""
    work, loop = asyncio.current_task(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, work.cancel)
    await bench(settings, targets, reports)


def main(settings_json: str) -> None:
    """Run a benchmark and tell of it; of what there is, if a later cluster fails."""
    settings = from_json(settings_json)
    reports: list[Report] = []
    with told(settings.json_output):
        targets = targets_of(settings)
        try:
            asyncio.run(bench_until_told(settings, targets, reports))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise typer.Exit(INTERRUPTED_STATUS) from None
        except Exception:
            if not reports:
                raise
            show(settings, reports)
            with told():  # stdout has its one JSON document
                raise
        show(settings, reports)
        left_out = [name for name, _ in targets[len(reports) :]]
        if left_out:
            aside.print(f"[yellow]note[/] interrupted before {escape(', '.join(left_out))}", soft_wrap=True)
        raise typer.Exit(status_of(reports, left_out))


if __name__ == "__main__":
    typer.run(main)
