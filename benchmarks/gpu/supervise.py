"""Keeps measuring when a process dies or hangs: what it was at is noted, and another goes on behind that.

A wrong address leaves a process unable to use its GPU for anything more; a kernel may never end.
"""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.run_cases import OURS

STARTS_MAX = 12
POLL_S = 0.2
Progress = Callable[[dict], None]


class Notes:
    """What is in the file that a process writes."""

    def __init__(self, path: Path):
        self._path = path
        self._read_count = 0
        self.begun: tuple[str, str] | None = None
        self.results: list[dict] = []

    def read(self) -> list[dict]:
        """Lines that are new and whole, of results those alone."""
        if not self._path.exists():
            return []
        text = self._path.read_bytes()[self._read_count :]
        text = text[: text.rfind(b"\n") + 1]
        self._read_count += len(text)
        fresh = []
        for line in map(json.loads, text.splitlines()):
            if "begins" in line:
                self.begun = tuple(line["begins"])
            else:
                self.begun = None
                fresh.append(line)
        self.results += fresh
        return fresh

    def skipped(self) -> list[tuple[str, str]]:
        """Cases that have a result."""
        return [(f"{line['operation']} {line['sizes']}", OURS) for line in self.results]


def supervise(
    command: Callable[[Path], Sequence[str]], folder: Path, stall_s: float, end_s: float, tell: Progress
) -> list[dict]:
    """Results of a process, or of several until all cases have one.

    `command` is given the file that says what to skip. A process that notes nothing for `stall_s` is killed,
    and so is one that goes on so long after `end_s`. A peer that ends or hangs one is left out from then on.
    """
    notes, lost = Notes(folder / "notes"), []
    for _ in range(STARTS_MAX):
        skipped, results_count = folder / "skipped", len(notes.results)
        skipped.write_text(json.dumps(notes.skipped() + lost))
        why = watch(subprocess.Popen(command(skipped)), notes, stall_s, end_s, tell)
        if why is None or time.time() > end_s:
            break
        if notes.begun is None and len(notes.results) == results_count:
            tell({"operation": "-", "sizes": "-", "failed": f"{why} before any case began"})
            break
        if notes.begun is not None:
            note_lost(notes, lost, why, tell)
    return notes.results


def note_lost(notes: Notes, lost: list[tuple[str, str]], why: str, tell: Progress) -> None:
    """Leave out what a process was at when it ended: the case, or the peer in all cases of the operation."""
    name, who = notes.begun
    notes.begun = None
    operation, sizes = name.split(" ", 1)
    if who != OURS:
        lost.append((operation, who))
        return
    failed = {"operation": operation, "sizes": sizes, "failed": why}
    notes.results.append(failed)
    tell(failed)


def watch(
    process: subprocess.Popen, notes: Notes, stall_s: float, end_s: float, tell: Progress
) -> str | None:
    """Tell results as they come; how the process ended, or None if it ended well."""
    heard_s, before = time.time(), None
    while True:
        code = process.poll()
        for line in notes.read():
            tell(line)
        if (state := (notes.begun, len(notes.results))) != before:
            heard_s, before = time.time(), state
        if code is not None:
            return None if code == 0 else f"the process ended with {code}"
        if time.time() > min(heard_s, end_s) + stall_s:
            process.kill()
            process.wait()
            return f"nothing came for {stall_s:.0f} s"
        time.sleep(POLL_S)
