"""The searches that go over numbers one by one, as machine code."""

from collections.abc import Callable
from pathlib import Path

from kernels.ops.machine_code import AS_WRITTEN, kept_folder, machine_code

SOURCES = [*sorted(Path(__file__).parent.glob("placement_*.py")), Path(__file__)]
KEPT = kept_folder(SOURCES[0], SOURCES)
MARK = "all"  # the name of an empty file beside the machine code, once all of it is there


def is_compiled() -> bool:
    """Whether some process has compiled everything, so that this one need only read it."""
    return KEPT is not None and (KEPT / MARK).exists()


def mark_compiled() -> None:
    """Say that everything has been compiled."""
    if KEPT is not None:
        (KEPT / MARK).touch()


def compiled(function: Callable) -> Callable:
    """Compile at the first call; numbers are added as written, so that every machine gets the same plan."""
    return machine_code(function, None, AS_WRITTEN, SOURCES)


def in_place(function: Callable) -> Callable:
    """The same for a function that makes no arrays, but changes or reads those it is given."""
    return machine_code(function, None, AS_WRITTEN, SOURCES, makes_arrays=False)


def inlined(function: Callable) -> Callable:
    """The same as `in_place`, into its callers: to hand over a whole layer takes longer than what it does."""
    return machine_code(function, None, AS_WRITTEN, SOURCES, is_inlined=True, makes_arrays=False)
