"""Cases one after the other: checked, timed, told to a file line by line, so that nothing measured is lost.

A line says what begins, so that whoever reads the file knows what was under way when a process died or hung.
"""

import json
import time
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.gpu.case import Case, Ready, Run, first, relative_error
from benchmarks.gpu.peers import reason
from benchmarks.gpu.roofline import Roofline
from benchmarks.gpu.timing import Measured

OURS = "ours"
PEER_TOLERANCE = 5e-2


class Timer(Protocol):
    """Who times a call."""

    def measure(self, run: Run) -> Measured:
        """Time of one call."""


class Runner:
    """Runs cases on one device and notes everything in a file."""

    def __init__(
        self,
        device: torch.device,
        timer: Timer,
        roofline: Roofline,
        notes: Path,
        skipped: Collection[tuple[str, str]] = (),
    ):
        """`skipped`: a case with `OURS` is not run at all; an operation with a peer, without that peer."""
        self._device, self._timer, self._roofline = device, timer, roofline
        self._notes, self._skipped = notes, set(skipped)

    def run(self, cases: Iterable[Case], end_s: float, kernels: AbstractContextManager) -> None:
        """All cases until `end_s`, in seconds since the epoch; those after it are noted as not run.

        Raises what the device raises once it can compute nothing more.
        """
        with kernels:
            for case in cases:
                if (case.name, OURS) in self._skipped:
                    continue
                if time.time() > end_s:
                    self._note_result(case, {"failed": "not run: the time was up"})
                    continue
                self._note_result(case, self._figures(case))
                if self._device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()

    def _figures(self, case: Case) -> dict:
        self._note_begin(case, OURS)
        try:
            ready = case.make(self._device)
            error = ready.error()
            if not error <= ready.tolerance:
                return {"failed": f"wrong: relative error {error:.2g}, at most {ready.tolerance:.2g}"}
            measured = self._timer.measure(ready.run)
        except Exception as error:  # a kernel that fails must not keep the others from being measured
            return {"failed": reason(error)}
        figures = work_figures(ready, measured, self._roofline) | {"error": error}
        return figures | {"peers": self._peers(case, ready, measured)}

    def _peers(self, case: Case, ready: Ready, ours: Measured) -> dict[str, dict]:
        peers = {}
        for name, make in ready.peers.items():
            if (case.operation, name) in self._skipped:
                peers[name] = {"failed": "ended or hung the process, here or in a case before"}
                continue
            self._note_begin(case, name)
            try:
                peers[name] = self._peer_figures(ready, make(), ours)
            except Exception as error:  # as above: a peer of another version may raise anything
                peers[name] = {"failed": reason(error)}
        return peers

    def _peer_figures(self, ready: Ready, run: Run, ours: Measured) -> dict:
        out = run()
        if isinstance(out, torch.Tensor) and isinstance(mine := first(ready.run()), torch.Tensor):
            error = relative_error(out, mine)
            if not error <= PEER_TOLERANCE:
                return {"failed": f"differs from ours by {error:.2g}"}
        measured = self._timer.measure(run)
        figures = {"us": round(measured.us, 2), "ours is faster by": round(measured.us / ours.us, 3)}
        return figures | ({} if measured.is_recorded else {"called": "from Python"})

    def _note_begin(self, case: Case, who: str) -> None:
        self._note({"begins": [case.name, who]})

    def _note_result(self, case: Case, figures: dict) -> None:
        self._note({"operation": case.operation, "sizes": case.sizes} | figures)

    def _note(self, line: dict) -> None:
        with self._notes.open("a") as file:
            file.write(json.dumps(line) + "\n")


def work_figures(ready: Ready, measured: Measured, roofline: Roofline) -> dict:
    """Time, rates and share of what is physically possible."""
    work, us = ready.work, measured.us
    figures = {
        "us": round(us, 2),
        "tflop/s": round(work.flops / us / 1e6, 1),
        "gb/s": round(work.bytes / us / 1e3, 1),
        "floor us": round(roofline.floor_us(work), 2),
        "limit": roofline.limit(work),
        "share": round(roofline.floor_us(work) / us, 3),
    }
    return figures | ({} if measured.is_recorded else {"called": "from Python"})
