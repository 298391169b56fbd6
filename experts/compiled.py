"""Searches that go over numbers one by one, as machine code."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from numba import config, njit

FOLDER = Path(__file__).parent
# Numba would not notice a change in another file, in a function that is called from this one: so the machine
# code is kept in a folder named after the contents of all files.
SOURCES = sorted((FOLDER / "compiled.py", *FOLDER.glob("placement_*.py")))
DIGEST = sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]


def compiled(function: Callable) -> Callable:
    """Compile at the first call, or read what an earlier process has compiled; it runs without the GIL.

    Floats are added in the order that is written, and no product and sum are rounded as one, so that every
    machine gets the same numbers.
    """
    before = config.CACHE_DIR
    config.CACHE_DIR = before or str(FOLDER / "__pycache__" / f"placement-{DIGEST}")
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # neither that folder nor the user's may be written
        return njit(nogil=True, error_model="numpy")(function)
    finally:
        config.CACHE_DIR = before
