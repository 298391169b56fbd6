"""Triton's door, and who runs an operation: its kernel on a GPU, compiled loops or torch on a CPU.

Where there is no GPU Triton is not loaded (72 MB a process), and kernels are functions that nobody launches;
unless TRITON_INTERPRET is set: 1 runs kernels on the CPU in Triton's interpreter, 0 lets them be compiled for
a GPU that is not there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    import triton
    import triton.language as tl

    IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
    triton.knobs.language.default_fp_fusion = True  # a product and its sum round once, whatever the version
else:
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=lambda number: number)
    IS_INTERPRETED = False

INTERPRETED = tl.constexpr(IS_INTERPRETED)  # what kernels may read, for what the interpreter does wrong

_forced = False


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether an operation on this tensor belongs to its Triton kernel."""
    return tensor.is_cuda or _forced


@contextmanager
def kernels_forced() -> Iterator[None]:
    """Meanwhile kernels take tensors of a CPU too, in the interpreter: the GPU's path, without a GPU.

    Raises RuntimeError where kernels are not interpreted.
    """
    global _forced
    if not IS_INTERPRETED:
        raise RuntimeError("kernels run on a CPU in Triton's interpreter alone: set TRITON_INTERPRET=1")
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
