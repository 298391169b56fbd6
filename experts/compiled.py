"""The searches that go over numbers one by one, as machine code."""

from collections.abc import Callable
from pathlib import Path

from kernels.ops.compiled import AS_WRITTEN, machine_code

SOURCES = list(Path(__file__).parent.glob("placement_*.py"))


def compiled(function: Callable) -> Callable:
    """Compile at the first call; numbers are added as written, so that every machine gets the same plan."""
    return machine_code(function, None, AS_WRITTEN, SOURCES)


def inlined(function: Callable) -> Callable:
    """The same, into its callers: to hand over a whole layer takes longer than what a small function does."""
    return machine_code(function, None, AS_WRITTEN, SOURCES, is_inlined=True)
