"""Every kernel at DeepSeek-V3's sizes, beside the chip's limits and others: `python -m benchmarks.kernels`.

First what the GPU copies and multiplies at most, then each operation: its output is checked, then it is
timed, and so is every peer that is found. `share` is the least time that the work could take (each byte moved
once, or every product at full rate: m or p) over the time that it takes. With no GPU there are no figures.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

if "--interpret" in sys.argv:  # read by Triton when it is imported, before any option is parsed
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu.attention_cases import decode_cases, prefill_cases
from benchmarks.gpu.case import Case
from benchmarks.gpu.expert_cases import expert_cases, group_cases, mix_cases
from benchmarks.gpu.peers import found_peers, load_folder
from benchmarks.gpu.report import line_of, machine, show, wide_console
from benchmarks.gpu.roofline import H200, Roofline, measured_roofline
from benchmarks.gpu.row_cases import gate_cases, latents_cases, linear_cases, norm_cases, sample_cases
from benchmarks.gpu.run_cases import Runner
from benchmarks.gpu.sizes import FEW, QUICK, TINY, V3, WHOLE, Counts, Dimensions
from benchmarks.gpu.supervise import supervise
from benchmarks.gpu.tiles import put
from benchmarks.gpu.timing import DeviceTimer, HostTimer
from kernels.ops.backend import kernels_forced

OPERATIONS = {
    "mla_decode": decode_cases,
    "experts": expert_cases,
    "gate": gate_cases,
    "mla_prefill": prefill_cases,
    "linear_fp8": linear_cases,
    "rms_norm": norm_cases,
    "latents": latents_cases,
    "sample": sample_cases,
    "group_by_expert": group_cases,
    "mix": mix_cases,
}
NO_GPU = (
    "no GPU was found: these times need an NVIDIA GPU of compute capability 9.0 or later with a driver that "
    "torch can use; --interpret runs every case at tiny sizes without one"
)
QUICK_TIME_S, TIME_S = 100, 440
RESULTS = Path("benchmarks/results/kernels.json")
console = wide_console()


def main(
    only: Annotated[str, typer.Option(help=f"some of {', '.join(OPERATIONS)}, with commas")] = "",
    quick: Annotated[bool, typer.Option(help="few sizes, under two minutes")] = False,
    warm: Annotated[bool, typer.Option(help="leave the L2 cache as the call before left it")] = False,
    tile: Annotated[str, typer.Option(help="another tile than is shipped, as wide=64,32,8,3")] = "",
    peers: Annotated[Path | None, typer.Option(help="a folder with modules and libraries of peers")] = None,
    output: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS,
    time_s: Annotated[int | None, typer.Option(help="no case begins later")] = None,
    stall_s: Annotated[int, typer.Option(help="a case that takes longer is given up")] = 120,
    interpret: Annotated[
        bool, typer.Option(help="tiny sizes in Triton's interpreter, to see them run")
    ] = False,
    notes: Annotated[Path | None, typer.Option(hidden=True)] = None,
    skipped: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure every kernel and print tables."""
    if tile:
        put(tile)
    counts = QUICK if quick else WHOLE
    end_s = time.time() + (time_s or (QUICK_TIME_S if quick else TIME_S))
    if interpret:
        raise SystemExit(interpreted(only))
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    asked = list(cases(V3, counts, only))
    if notes is not None:
        measure(asked, peers, warm, notes, skipped, end_s)
        return
    options = ["--only", only, *(["--quick"] if quick else []), *(["--warm"] if warm else [])]
    options += [*(["--tile", tile] if tile else []), *(["--peers", str(peers)] if peers else [])]
    report(options, output, stall_s, end_s)


def cases(dims: Dimensions, counts: Counts, only: str) -> Iterator[Case]:
    """Those of the named operations, or all; raises typer.BadParameter for a name that is none."""
    names = [name.strip() for name in only.split(",") if name.strip()] or list(OPERATIONS)
    if unknown := [name for name in names if name not in OPERATIONS]:
        raise typer.BadParameter(f"--only {unknown[0]}: give some of {', '.join(OPERATIONS)}")
    for name in names:
        yield from OPERATIONS[name](dims, counts)


def interpreted(only: str) -> int:
    """Every case once at tiny sizes; the number of those that failed, at most 1."""
    with tempfile.TemporaryDirectory(prefix="trivium-kernels-") as made:
        notes = Path(made) / "notes"
        runner = Runner(torch.device("cpu"), HostTimer(), H200, notes)
        runner.run(cases(TINY, FEW, only), time.time() + 600, kernels_forced())
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
    results = [line for line in lines if "begins" not in line]
    failed = [result for result in results if "failed" in result]
    for result in failed:
        print(line_of(result))
    print(
        f"{len(results) - len(failed)} of {len(results)} cases ran and were right, at tiny sizes, interpreted"
    )
    return 1 if failed else 0


def measure(
    asked: list[Case], peers: Path | None, warm: bool, notes: Path, skipped: Path | None, end_s: float
) -> None:
    """What one process does: note the device's limits, then one case after the other."""
    failures = load_folder(peers) if peers else []
    at = notes.with_name("limits")
    if not at.exists():
        roofline = measured_roofline()
        limits = {"roofline": roofline.figures(), "machine": machine(), "peers": found_peers()}
        at.write_text(json.dumps(limits | {"not loaded": failures}))
    roofline = Roofline(**json.loads(at.read_text())["roofline"])
    passed = [tuple(pair) for pair in json.loads(skipped.read_text())] if skipped else []
    gc.freeze()
    Runner(torch.device("cuda"), DeviceTimer(warm), roofline, notes, passed).run(asked, end_s, nullcontext())


def report(options: list[str], output: Path, stall_s: float, end_s: float) -> None:
    """Have it all measured by processes that may die, then show and keep what they found."""
    with tempfile.TemporaryDirectory(prefix="trivium-kernels-") as made:
        folder = Path(made)
        limits = folder / "limits"
        results: list[dict] = []

        def command(skipped: Path) -> list[str]:
            left = ["--time-s", str(max(1, int(end_s - time.time()))), "--skipped", str(skipped)]
            own = ["--notes", str(folder / "notes"), *left]
            return [sys.executable, "-m", "benchmarks.kernels", *options, *own]

        def tell(result: dict) -> None:
            results.append(result)
            console.print(line_of(result), highlight=False)
            keep(output, limits, results)

        supervise(command, folder, stall_s, end_s, tell)
        about = json.loads(limits.read_text()) if limits.exists() else {}
    show(results, console)
    for name, figures in about.items():
        console.print(f"{name}: {figures}", highlight=False)
    console.print(f"figures are in {output}; m: memory is the limit, p: products; *: called from Python")


def keep(output: Path, limits: Path, results: list[dict]) -> None:
    """Write what is known so far, a line for each result: a run that is cut short has measured something."""
    about = json.loads(limits.read_text()) if limits.exists() else {}
    lines = ",\n".join(json.dumps(result) for result in results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f'{{"about": {json.dumps(about, indent=1)},\n"results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    typer.run(main)
