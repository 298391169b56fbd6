"""Tokens per second, and what stands between us and more: `python -m benchmarks.serving`.

Everything runs here and now, one after the other on the same cores: transformers' `generate`, our single
process, the cluster on Ray; dispatch and combine beside a bare socket; latents in flight; time to ready
beside bare Ray.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV3ForCausalLM

from benchmarks.dispatch import measure_dispatch
from benchmarks.model import make_model, prompts
from cluster.client import Client, Delta, Finished
from cluster.events import RoutedRequest
from cluster.reference import Reference
from cluster.validation import RequestedGeneration, RequestedSampling
from decode.messages import SamplingParameters
from kernels.model.checkpoint import Checkpoint

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 64
LONG_PROMPT_TOKENS = 2048
STREAMS = (1, 8, 32)
ROUNDS_MIN = 2
MEASURED_S = 4.0
PORT = 50071
RESULTS = Path("benchmarks/results/serving.json")

console = Console()


def main(output: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS) -> None:
    """Measure everything and print a table."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    figures: dict = {"cores": os.cpu_count(), "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    with tempfile.TemporaryDirectory(prefix="trivium-benchmark-") as made:
        folder = make_model(Path(made))
        figures["transformers"] = best_of_threads(lambda: measure_transformers(folder))
        figures["single process"] = best_of_threads(lambda: measure_single(folder))
        figures |= measure_cluster(folder)
    figures["dispatch"] = measure_dispatch()
    show(figures)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")


def best_of_threads(measure) -> dict[int, float]:
    """The better of one thread and of all cores, for each number of streams."""
    best: dict[int, float] = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for streams, rate in measure().items():
            best[streams] = max(best.get(streams, 0.0), rate)
    torch.set_num_threads(1)
    return best


def rate_of(run, streams: int) -> float:
    """Output tokens per second of the best of some rounds: of several seconds, where rounds are short."""
    run(streams)
    times: list[float] = []
    while len(times) < ROUNDS_MIN or sum(times) < MEASURED_S:
        begin = time.perf_counter()
        run(streams)
        times.append(time.perf_counter() - begin)
    return round(streams * OUTPUT_TOKENS / min(times), 1)


def measure_transformers(folder: Path) -> dict[int, float]:
    """`generate` with all streams as one batch of equal lengths, which suits it best."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    def run(streams: int) -> None:
        ids = torch.tensor(prompts(streams, PROMPT_TOKENS))
        counts = {"max_new_tokens": OUTPUT_TOKENS, "min_new_tokens": OUTPUT_TOKENS}
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **counts
            )

    return {streams: rate_of(run, streams) for streams in STREAMS}


def measure_single(folder: Path) -> dict[int, float]:
    """Our nodes and router in one thread with LocalExperts."""
    reference = Reference(Checkpoint(folder))
    sampling = SamplingParameters(temperature=0.0, tokens_max=OUTPUT_TOKENS, ignore_eos=True)

    def run(streams: int) -> None:
        asked = enumerate(prompts(streams, PROMPT_TOKENS))
        reference.generate(
            [RoutedRequest(f"{time.monotonic()} {i}", tuple(ids), sampling) for i, ids in asked]
        )

    rates = {streams: rate_of(run, streams) for streams in STREAMS}
    reference.close()
    return rates


def measure_cluster(folder: Path) -> dict:
    """`trivium serve` with its default pools: time to ready, tokens per second, latents in flight."""
    bare_s = time_bare_ray()
    config = folder / "cluster.yaml"
    config.write_text(
        f"model: {{folder: {folder}}}\ngateway: {{port: {PORT}}}\nexperts: {{shards_count: 1}}\n"
        "prefill: {step_tokens_max: 2048}\ndashboard: {enabled: false}\n"
    )
    begin = time.perf_counter()
    command = [sys.executable, "-m", "cluster.cli", "serve", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(until_serving(f"127.0.0.1:{PORT}"))
        ready_s = time.perf_counter() - begin
        rates = {streams: rate_of(lambda n: asyncio.run(stream(n)), streams) for streams in STREAMS}
        in_flight = asyncio.run(share_in_flight())
    finally:
        process.terminate()
        process.wait(timeout=60)
    return {
        "cluster": rates,
        "latents in flight, share of prefill": in_flight,
        "seconds to ready": {"trivium serve": round(ready_s, 2), "bare ray.init and Serve": round(bare_s, 2)},
    }


def time_bare_ray() -> float:
    """Seconds from nothing to one empty deployment that answers."""
    script = (
        "import logging, ray\nfrom ray import serve\n"
        "ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)\n"
        "serve.start(proxy_location='Disabled')\n"
        "deployment = serve.deployment(type('Empty', (), {'__call__': lambda self: 1}), name='empty')\n"
        "handle = serve.run(deployment.bind(), route_prefix=None)\n"
        "handle.remote().result()\n"
        "import time; print(time.time())\n"
        "ray.shutdown()\n"
    )
    begin = time.time()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1]) - begin


async def until_serving(address: str) -> None:
    """Wait until the gateway says by health that it serves."""
    while True:
        async with Client(address) as client:
            if await client.is_serving():
                return
        await asyncio.sleep(0.05)


async def stream(streams: int) -> None:
    """All streams at once through gRPC."""
    sampling = RequestedSampling(temperature=0.0, tokens_max=OUTPUT_TOKENS, ignore_eos=True)
    async with Client(f"127.0.0.1:{PORT}") as client:

        async def one(token_ids: list[int]) -> int:
            request = RequestedGeneration(token_ids=tuple(token_ids), sampling=sampling)
            events = [event async for event in client.generate(request)]
            return sum(len(event.token_ids) for event in events if isinstance(event, Delta))

        counts = await asyncio.gather(*(one(ids) for ids in prompts(streams, PROMPT_TOKENS)))
    if set(counts) != {OUTPUT_TOKENS}:
        raise RuntimeError(f"streams ended early: {counts}")


async def share_in_flight() -> dict[int, float]:
    """Worst share of prefill time that passes from the last layer's compute until decode has all latents."""
    shares: dict[int, float] = {}
    sampling = RequestedSampling(temperature=0.0, tokens_max=8, ignore_eos=True)
    async with Client(f"127.0.0.1:{PORT}") as client:
        for tokens_count in (PROMPT_TOKENS, 512, LONG_PROMPT_TOKENS):
            for token_ids in prompts(2 + ROUNDS_MIN, tokens_count)[2:]:
                fresh = (*token_ids[1:], 2 + tokens_count)
                async for event in client.generate(RequestedGeneration(token_ids=fresh, sampling=sampling)):
                    if isinstance(event, Finished):
                        share = event.timing.transfer_s / event.timing.prefill_s
                        shares[tokens_count] = round(max(shares.get(tokens_count, 0.0), share), 4)
    return shares


def show(figures: dict) -> None:
    """Print the figures beside their aims."""
    table = Table(title="output tokens per second")
    for column in (
        "streams",
        "transformers",
        "single process",
        "cluster",
        "cluster / transformers",
        "cluster / single",
    ):
        table.add_column(column, justify="right")
    for streams in STREAMS:
        rates = [figures[engine][streams] for engine in ("transformers", "single process", "cluster")]
        ratios = [f"{rates[2] / rates[0]:.2f}", f"{rates[2] / rates[1]:.2f}"]
        table.add_row(str(streams), *(f"{rate:.0f}" for rate in rates), *ratios)
    console.print(table)
    for name in ("dispatch", "latents in flight, share of prefill", "seconds to ready"):
        console.print(f"{name}: {figures[name]}")


if __name__ == "__main__":
    typer.run(main)
