"""What requests feel while experts move, and while a shard dies: `python -m benchmarks.rebalance`.

One local cluster of three shards, 32 streams. Milliseconds between one token of a stream and the next are
compared within the run: before, while experts move again and again, and after one of the shards is killed.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.model import make_model, prompts
from benchmarks.serving import until_serving
from cluster.client import Client, Delta
from cluster.proto import trivium_pb2
from cluster.validation import RequestedGeneration, RequestedSampling

STREAMS = 32
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 128
MOVES = 10
PHASE_S = 15.0
ASK_S = 0.25  # between one question to the coordinator and the next: asking takes time of both cores too
PORT = 50072
RESULTS = Path("benchmarks/results/rebalance.json")

console = Console()


def main(output: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS) -> None:
    """Measure both and print a table."""
    figures: dict = {"cores": os.cpu_count(), "streams": STREAMS}
    with tempfile.TemporaryDirectory(prefix="trivium-benchmark-") as made:
        folder = make_model(Path(made))
        with serving(folder, "replicas_min: 2"):
            figures |= asyncio.run(measure())
    show(figures)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")


class serving:
    """A local cluster of three shards that a person moves."""

    def __init__(self, folder: Path, replicas: str):
        self._config = folder / "cluster.yaml"
        self._config.write_text(
            f"model: {{folder: {folder}}}\ngateway: {{port: {PORT}}}\ndashboard: {{enabled: false}}\n"
            f"experts: {{shards_count: 3, rebalance: false, {replicas}}}\n"
        )

    def __enter__(self) -> None:
        command = [sys.executable, "-m", "cluster.cli", "serve", str(self._config)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        asyncio.run(until_serving(f"127.0.0.1:{PORT}"))

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


async def measure() -> dict:
    """Gaps between tokens in each phase, and how long experts took."""
    async with Client(f"127.0.0.1:{PORT}") as client, streams(client) as gaps:
        await asyncio.sleep(PHASE_S)
        gaps.clear()
        await asyncio.sleep(PHASE_S)
        before = percentiles(gaps)
        gaps.clear()
        begin_s = time.monotonic()
        await move_again_and_again(client)
        moves_s = time.monotonic() - begin_s
        moving = percentiles(gaps)
        recovery_s = await kill_a_shard(client)
        gaps_at_death_s = max(gaps)
        dying = percentiles(gaps)
    return {
        "gaps in ms": {"before": before, "while experts move": moving, "while a shard dies": dying},
        "p99 moving / before": round(moving["p99"] / before["p99"], 2),
        "seconds of one move": round(moves_s / MOVES, 2),
        "longest gap at a death, ms": round(1e3 * gaps_at_death_s, 1),
        "seconds until two replicas of all are in force": round(recovery_s, 2),
    }


@asynccontextmanager
async def streams(client: Client) -> AsyncIterator[list[float]]:
    """Streams that begin again whenever they end; seconds between their tokens, as they come."""
    gaps: list[float] = []
    sampling = RequestedSampling(temperature=0.0, tokens_max=OUTPUT_TOKENS, ignore_eos=True)

    async def one(token_ids: list[int]) -> None:
        while True:
            last_s = None
            async for event in client.generate(
                RequestedGeneration(token_ids=tuple(token_ids), sampling=sampling)
            ):
                if isinstance(event, Delta):
                    now_s = time.monotonic()
                    if last_s is not None:
                        gaps.append(now_s - last_s)
                    last_s = now_s

    work = [asyncio.create_task(one(ids)) for ids in prompts(STREAMS, PROMPT_TOKENS)]
    try:
        yield gaps
    finally:
        for task in work:
            task.cancel()
        results = await asyncio.gather(*work, return_exceptions=True)
    failures = [result for result in results if not isinstance(result, asyncio.CancelledError)]
    if failures:
        raise RuntimeError(f"{len(failures)} streams failed, the first with {failures[0]!r}")


async def move_again_and_again(client: Client) -> None:
    """Give experts other homes, two each, so that a third of them must be loaded each time."""
    chance = random.Random(1)
    for _ in range(MOVES):
        experts = await client.get_experts()
        layers = [
            trivium_pb2.LayerOfExperts(
                layer=layer.layer,
                homes=[trivium_pb2.Homes(shards=sorted(chance.sample(range(3), 2))) for _ in layer.homes],
            )
            for layer in experts.layers
        ]
        await client.move_experts(layers, experts.placement_epoch)
        await until_still(client)


async def until_still(client: Client) -> None:
    """Wait until no expert is on its way."""
    while (await client.get_experts()).is_moving:
        await asyncio.sleep(ASK_S)


async def kill_a_shard(client: Client) -> float:
    """Seconds from `kill -9` until two replicas of every expert are in force, none on the dead shard."""
    there = set((await client.get_experts()).shards)
    os.kill(pid_of_a_shard(), signal.SIGKILL)
    begin_s = time.monotonic()
    while True:
        experts = await client.get_experts()
        replicas_counts = [len(home.shards) for layer in experts.layers for home in layer.homes]
        if there - set(experts.shards) and min(replicas_counts) >= 2:
            return time.monotonic() - begin_s
        await asyncio.sleep(0.05)


def pid_of_a_shard() -> int:
    """One of the processes that Ray names after our pool."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = process.read_bytes()
        except OSError:
            continue  # it has just ended
        if b"ServeReplica:trivium:experts" in title:
            return int(process.parent.name)
    raise RuntimeError("no shard runs on this host")


def percentiles(gaps: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(gaps)
    return {
        name: round(1e3 * ordered[int(share * (len(ordered) - 1))], 1)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
    }


def show(figures: dict) -> None:
    """Print the figures."""
    table = Table(title="milliseconds from one token of a stream to the next")
    table.add_column("")
    for name in ("p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for phase, values in figures["gaps in ms"].items():
        table.add_row(phase, *(str(value) for value in values.values()))
    console.print(table)
    for name, value in figures.items():
        if not isinstance(value, dict):
            console.print(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
