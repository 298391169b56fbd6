"""Figures as tables, and what they were measured on."""

import os
import platform
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

from kernels.ops.backend import triton

COLUMNS = ("sizes", "µs", "TFLOP/s", "GB/s", "floor µs", "share", "others: µs (ours is faster by)")
QUERIED = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"


def machine() -> dict[str, str]:
    """Versions, and the GPU as its driver describes it at this moment."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"triton": getattr(triton, "__version__", "not loaded"), "cuda": str(torch.version.cuda)}
    versions["cores"] = str(os.cpu_count())
    return versions | gpu_state()


def gpu_state() -> dict[str, str]:
    """Clocks, temperature and power; nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={QUERIED}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(QUERIED.split(","), values, strict=False))


def line_of(result: dict) -> str:
    """One result as progress is told."""
    if "failed" in result:
        return f"{result['operation']} {result['sizes']}: {result['failed']}"
    return (
        f"{result['operation']} {result['sizes']}: {result['us']:.1f} µs, {result['share']:.0%} of the limit"
    )


def others_of(result: dict) -> str:
    """Peers of one result, the fastest first; a star means that it was called from Python."""
    told = []
    timed = {name: one for name, one in result["peers"].items() if "us" in one}
    for name, one in sorted(timed.items(), key=lambda item: item[1]["us"]):
        star = "*" if "called" in one else ""
        told.append(f"{name} {one['us']:.1f}{star} ({one['ours is faster by']:.2f})")
    return "; ".join(told)


def failures_of(results: list[dict]) -> dict[str, int]:
    """Why peers gave no time, with how often."""
    failures: dict[str, int] = {}
    for result in results:
        for name, one in result.get("peers", {}).items():
            if "failed" in one:
                why = f"{result['operation']}, {name}: {one['failed']}"
                failures[why] = failures.get(why, 0) + 1
    return failures


def show(results: list[dict], console: Console) -> None:
    """One table for each operation; under it, what failed."""
    for operation in dict.fromkeys(result["operation"] for result in results):
        table = Table(title=operation)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in (COLUMNS[0], COLUMNS[-1]) else "right")
        for result in (one for one in results if one["operation"] == operation):
            if "failed" in result:
                table.add_row(result["sizes"], "-", "-", "-", "-", "-", result["failed"])
                continue
            star = "*" if "called" in result else ""
            limit = "m" if result["limit"] == "memory" else "p"
            rates = (f"{result['tflop/s']:.0f}", f"{result['gb/s']:.0f}", f"{result['floor us']:.1f} {limit}")
            times = (f"{result['us']:.1f}{star}", *rates, f"{result['share']:.0%}")
            table.add_row(result["sizes"], *times, others_of(result))
        console.print(table)
    for why, count in failures_of(results).items():
        console.print(f"{why}{f' ({count} times)' if count > 1 else ''}")


def wide_console() -> Console:
    """As wide as a terminal, or wide enough where the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 170)
