"""Functions of arrays as machine code, kept between processes: the one place that knows Numba."""

import os
import threading
from collections.abc import Callable, Iterable, Set
from hashlib import sha256
from pathlib import Path

from numba import config, njit

AS_WRITTEN: Set[str] = frozenset()
ONE_ROUNDING = frozenset({"contract"})  # a product and the sum it goes into
CACHE_LOCK = threading.Lock()  # Numba's place for what it keeps is one for the whole process
ANY_ORDER = ONE_ROUNDING | {"reassoc", "nsz"}  # sums fill whole registers: same order for the same length


def machine_code(
    function: Callable,
    signature: str | None,
    freedoms: Set[str],
    sources: Iterable[Path],
    is_inlined: bool = False,
    makes_arrays: bool = True,
) -> Callable:
    """Compile a function, or read what an earlier process has compiled, where there is a place to keep it.

    `sources` are the other files whose functions it calls. What `is_inlined` is compiled anew into each of
    its callers. What makes no arrays counts no references to those it is given: in small loops that counting,
    at every call and slice, takes many times what the loop does.
    """
    options = {
        "fastmath": set(freedoms),
        "error_model": "numpy",
        "nogil": True,
        "forceinline": is_inlined,
        "_nrt": makes_arrays,
    }
    own = Path(function.__code__.co_filename)
    folder = kept_folder(own, [own, *sources])
    with CACHE_LOCK:
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder or "")
        try:
            return njit(signature, cache=folder is not None, **options)(function)
        except (
            Exception
        ):  # what was kept is damaged, or the disk is full; a fault of the code shows again here
            return njit(signature, **options)(function)
        finally:
            config.CACHE_DIR = before


def kept_folder(own: Path, sources: Iterable[Path]) -> Path | None:
    """Where machine code of these sources is kept, or None: beside the code, or in the user's cache.

    Numba would not notice a change in a function that is called from another file, nor an index that was
    written for code that was not: so the folder is named after the contents of all files.
    """
    every = sorted({*sources, Path(__file__)})
    digest = sha256(b"".join(source.read_bytes() for source in every)).hexdigest()[:16]
    cache = os.environ.get("NUMBA_CACHE_DIR")
    bases = [Path(cache)] if cache else [own.parent / "__pycache__", Path.home() / ".cache" / "trivium"]
    for base in bases:
        folder = base / f"compiled-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for cut_short in folder.rglob("*.nb[ic]"):
                if not cut_short.stat().st_size:
                    cut_short.unlink()
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None
