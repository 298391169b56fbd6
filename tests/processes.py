"""Find the processes that a run of the tests started and that still live (Linux: read from /proc)."""

import os
import time
from pathlib import Path

MARK = "TRIVIUM_TEST_RUN"  # an environment variable that children inherit even when their parent is gone
PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # leave with the interpreter


def processes_left(mark: str, timeout_s: float = 0.0) -> dict[int, str]:
    """Command line by process id of those that still live after up to `timeout_s` of patience."""
    deadline = time.monotonic() + timeout_s
    while (left := _marked_and_descendants(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _marked_and_descendants(mark: str) -> dict[int, str]:
    """The marked processes, and all below them or us: a process that renames itself may lose its mark."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").glob("[0-9]*")}
    ours = {process_id for process_id in parents if _has_mark(process_id, mark)} | {os.getpid()}
    while below := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= below
    commands = {process_id: _command(process_id) for process_id in sorted(ours - {os.getpid()})}
    return {
        key: text for key, text in commands.items() if text and not any(own in text for own in PYTHONS_OWN)
    }


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _has_mark(process_id: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process_id}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _command(process_id: int) -> str:
    """The command line; empty for a process that has ended, a zombie among them."""
    try:
        return (
            Path(f"/proc/{process_id}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
            .strip()
        )
    except OSError:
        return ""
