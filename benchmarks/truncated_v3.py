"""DeepSeek-V3's shape cut to four layers, prefilled and decoded: `python -m benchmarks.truncated_v3`.

One GPU holds a dense layer and three MoE layers with all 256 experts each (random FP8 weights, made there;
about 11.3 GB of experts a layer), and runs them through the nodes' own steps. Each step is timed four times:

    none    no layer: embedding, last norm, logits, and what the host adds
    dense   the dense layer
    half    all layers, routed experts answering at once with zeros: what a node computes
    whole   all layers with all routed experts on this GPU

    dense layer = dense - none      half layer = (half - dense) / 3      whole layer = (whole - dense) / 3

and so is a shard's part of a layer, for the slots that a deployment would send it. What follows for 61 layers
is `benchmarks/gpu/deployment.py`, whose arithmetic is printed line by line. Left out are the network, which
is told in bytes beside, uneven loads of experts, sampling, and whatever a cluster does between steps.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

if "--interpret" in sys.argv:  # read by Triton when it is imported, before any option is parsed
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu.banks import bank_slice, random_bank
from benchmarks.gpu.deployment import DEPLOYMENTS, PUBLISHED, Deployment, Shape, StepTimes, lines_of, project
from benchmarks.gpu.peers import reason
from benchmarks.gpu.report import machine, wide_console
from benchmarks.gpu.timing import DeviceTimer, HostTimer
from benchmarks.gpu.v3_model import (
    TINY,
    V3,
    WHOLE_DENSE,
    WHOLE_LAYERS,
    filled_cache,
    random_transformer,
    truncated_config,
)
from benchmarks.gpu.v3_steps import TruncatedModel, shard_us
from benchmarks.gpu.work import FP8
from kernels.model.config import ModelConfig
from kernels.model.pages import PAGE_TOKENS
from kernels.ops.backend import kernels_forced

NO_GPU = (
    "no GPU was found: four layers of DeepSeek-V3 need an NVIDIA GPU of compute capability 9.0 or later with "
    "70 GB of memory; --interpret runs a tiny model without one"
)
RESULTS = Path("benchmarks/results/truncated_v3.json")
console = wide_console()


def main(
    prompts: Annotated[str, typer.Option(help="tokens of prompts, with commas")] = "1024,4096,16384",
    batches: Annotated[str, typer.Option(help="requests of decode steps, with commas")] = "1,8,32,128",
    context: Annotated[int, typer.Option(help="tokens that each decoding request has")] = 4096,
    layers: Annotated[int, typer.Option(help="layers, dense ones included")] = 4,
    dense: Annotated[int, typer.Option(help="dense layers")] = 1,
    fp8_latents: Annotated[bool, typer.Option(help="keep latents in 656 bytes")] = False,
    graphs: Annotated[bool, typer.Option(help="record decode steps in CUDA graphs")] = True,
    output: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS,
    interpret: Annotated[bool, typer.Option(help="a tiny model in Triton's interpreter")] = False,
) -> None:
    """Measure layers and steps, and project them."""
    if not interpret and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cpu" if interpret else "cuda")
    config = truncated_config(TINY if interpret else V3, layers, dense)
    sizes = [numbers_of(text) for text in (prompts, batches)]
    figures: dict = {"machine": machine(), "layers": layers, "dense": dense, "context": context}
    figures |= {"latents": "FP8" if fp8_latents else "bf16", "graphs": graphs and not interpret}
    with kernels_forced() if interpret else nullcontext():
        model = truncated_model(config, *sizes, context, fp8_latents, figures["graphs"], device)
        measure(model, *sizes, context, figures, lambda: keep(output, figures))
    console.print(f"{PUBLISHED}\nfigures are in {output}", highlight=False)


def numbers_of(text: str) -> list[int]:
    """Positive numbers with commas between; raises typer.BadParameter for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"'{text}': give positive numbers with commas between")
    return [int(part) for part in parts]


def truncated_model(
    config: ModelConfig,
    prompts: list[int],
    batches: list[int],
    context: int,
    packs_latents: bool,
    records: bool,
    device: torch.device,
) -> TruncatedModel:
    """Weights and as many pages as the largest step needs."""
    console.print(f"making {config.layers_count} layers of random weights", highlight=False)
    transformer = random_transformer(config, device)
    pages_each = -(-context // PAGE_TOKENS)
    pages = max([1, *(-(-tokens // PAGE_TOKENS) for tokens in prompts), *(n * pages_each for n in batches)])
    tokens_max = max([8, *prompts, *(-(-n // 8) * 8 for n in batches)])  # recorded steps have eights
    cache = filled_cache(transformer, pages, packs_latents)
    return TruncatedModel(transformer, cache, tokens_max, records)


def measure(
    model: TruncatedModel,
    prompts: list[int],
    batches: list[int],
    context: int,
    figures: dict,
    save: Callable[[], None],
) -> None:
    """Every step, its layers and what follows from them; what fails is told, and the rest goes on."""
    shards = Shards(model.transformer.config, model.transformer.device)
    steps = [("prefill", tokens, model.prefill_us, ()) for tokens in prompts]
    steps += [("decode", requests, model.decode_us, (context,)) for requests in batches]
    for kind, size, time_us, others in steps:
        sizes = f"{size:,} tokens" if kind == "prefill" else f"{size} requests of {context:,} tokens"
        console.print(f"\n[bold]{kind}, {sizes}[/bold]", highlight=False)
        try:
            one = measured(model, size, lambda variant: time_us(variant, size, *others), shards)  # noqa: B023
        except Exception as error:  # a size that fails must not keep the others from being measured
            one = {"failed": reason(error)}
            console.print(one["failed"], highlight=False, markup=False)
            if kind == "decode" and figures["graphs"]:
                restart_without_graphs()
        figures.setdefault(kind, {})[str(size)] = one
        save()


def restart_without_graphs() -> None:
    """A recording that failed leaves the device recording: begin again in its place, and record nothing."""
    console.print("beginning again with --no-graphs", highlight=False)
    given = [sys.executable, "-m", "benchmarks.truncated_v3", *sys.argv[1:], "--no-graphs"]
    os.execv(sys.executable, given)


def measured(model: TruncatedModel, tokens: int, time_us: Callable, shards: "Shards") -> dict:
    """One step's times and projections, which are printed."""
    config = model.transformer.config
    steps = {name: time_us(variant) for name, variant in model.variants().items()}
    counts = (config.dense_layers_count, len(config.moe_layers))
    times = StepTimes.of(tokens, *steps.values(), *counts)
    told = ", ".join(f"{name} {us / 1e3:,.3f}" for name, us in steps.items())
    console.print(f"steps, ms: {told}", highlight=False)
    console.print(
        f"µs: dense layer {times.dense_us:,.0f}; MoE layer without routed experts {times.half_us:,.0f}, "
        f"with all of them {times.whole_us:,.0f}",
        highlight=False,
    )
    projections = [shards.projection(times, deployment) for deployment in DEPLOYMENTS]
    return {"steps us": steps, "layers us": asdict(times), "projections": projections}


class Shards:
    """Times of a shard's part of a layer, for experts of a layer of this model."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self._config = config
        self._shape = Shape(
            WHOLE_DENSE,
            WHOLE_LAYERS - WHOLE_DENSE,
            config.routed_experts_count,
            config.gate.experts_per_token,
            config.hidden_size,
        )
        each = max(deployment.experts_each(self._shape) for deployment in DEPLOYMENTS)
        self._timer = DeviceTimer() if device.type == "cuda" else HostTimer()
        self._bank = random_bank(each, config.hidden_size, config.moe_intermediate_size, FP8, device)

    def projection(self, times: StepTimes, deployment: Deployment) -> dict:
        """One deployment, its arithmetic printed."""
        bank = bank_slice(self._bank, 0, deployment.experts_each(self._shape))
        slots = deployment.slots_each(self._shape, times.tokens)
        us = shard_us(self._config, bank, slots, self._timer)
        projected = project(self._shape, times, deployment, us)
        for line in lines_of(self._shape, times, deployment, projected):
            console.print(line, highlight=False)
        return projected.figures()


def keep(output: Path, figures: dict) -> None:
    """Write what is known so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
