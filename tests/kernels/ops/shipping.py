"""Compile the kernels that the GPU's path launches, for a Hopper GPU that is not there.

    TRITON_INTERPRET=0 python -m tests.kernels.ops.shipping rms_norm gate
    TRITON_INTERPRET=0 python -m tests.kernels.ops.shipping --table > docs/kernels.md

prints what became of each case of `tests/kernels/ops/shipped`, as JSON or as a page. A case calls the
product's own launchers with tensors of the meta device: what is compiled is what is shipped, constants too.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.kernels.ops import shipped

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES_MAX = 227 << 10


@dataclass(frozen=True, slots=True)
class Shipped:
    """One configuration: a call of a launcher, and the kernels that must have something in their code."""

    launch: Callable[[], object]
    wgmma: frozenset[str] = frozenset()  # which multiply with nothing else
    barriers: frozenset[str] = frozenset()  # whose warps wait for each other


@dataclass(frozen=True, slots=True)
class Built:
    """What the compiler made of one kernel."""

    kernel: str
    wgmma_count: int
    mma_count: int  # products of a single warp, as on older chips
    barriers_count: int
    shared_bytes: int
    registers_count: int
    stack_bytes: int  # memory that registers spill to


class AbsentHopper(DriverBase):
    """As much of a GPU as Triton asks for before it launches."""

    def __init__(self):
        """Nothing to open."""

    @classmethod
    def is_active(cls) -> bool:
        """Whether this driver has a GPU: it says so."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Of no use without a launch."""
        return "void*"

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return HOPPER

    def get_active_torch_device(self) -> torch.device:
        """Where tensors without memory are."""
        return torch.device("meta")

    def get_benchmarker(self) -> None:
        """Nothing can be measured."""

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def bfloat16(*shape: int) -> torch.Tensor:
    """A bfloat16 tensor without memory."""
    return meta(*shape, dtype=torch.bfloat16)


def module_names() -> list[str]:
    """Modules of `shipped`, in order."""
    return sorted(module.name for module in pkgutil.iter_modules(shipped.__path__))


def cases_of(name: str) -> dict[str, Shipped]:
    """The cases of one module of `shipped`."""
    return importlib.import_module(f"{shipped.__name__}.{name}").SHIPPED


@contextmanager
def compiling_alone() -> Iterator[list[object]]:
    """Meanwhile a launch compiles its kernel and puts it into the list."""
    triton.runtime.driver.set_active(AbsentHopper())
    compiled: list[object] = []
    launch = triton.JITFunction.run

    def compile_alone(self, *args, grid, warmup, **options):
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    triton.JITFunction.run = compile_alone
    try:
        yield compiled
    finally:
        triton.JITFunction.run = launch


def build(case: Shipped) -> list[Built]:
    """Compile what one case launches, each kernel once."""
    with compiling_alone() as compiled:
        case.launch()
    return [describe(kernel) for kernel in dict.fromkeys(compiled)]


def describe(kernel: object) -> Built:
    """Count what matters in a compiled kernel."""
    usage = resource_usage(kernel.asm["cubin"])
    counts = (kernel.asm["ptx"].count(name) for name in ("wgmma.mma_async", "mma.sync", "bar.sync"))
    return Built(kernel.metadata.name, *counts, kernel.metadata.shared, usage["REG"], usage["STACK"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory that the machine code takes, by cuobjdump's names."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    pairs = (word.split(":") for word in told.split() if word.count(":") == 1)
    return {name: int(number) for name, number in pairs if number.isdigit()}


def main(names: list[str]) -> None:
    """Print `{module: {case: [built]}}` of some modules, or of all; as a page where it is asked for."""
    if names == ["--table"]:
        print(page())
        return
    told = {
        name: {title: [asdict(built) for built in build(case)] for title, case in cases_of(name).items()}
        for name in names or module_names()
    }
    json.dump(told, sys.stdout)


def page() -> str:
    """What the compiler makes of every kernel, a page of Markdown."""
    lines = [
        "# Kernels as compiled for Hopper (sm_90)",
        "",
        f"By Triton {triton.__version__}; `tests/kernels/ops/test_shipped.py` holds them to 227 KiB of",
        "shared memory, no stack (registers never spill), and WGMMA wherever a product has 64 rows. Made by",
        "`TRITON_INTERPRET=0 python -m tests.kernels.ops.shipping --table`.",
        "",
        "| operation | configuration | kernel | WGMMA | shared bytes | registers | stack bytes |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name in module_names():
        for title, case in cases_of(name).items():
            begin = f"| {name} | {title.removeprefix(name).strip()} |"
            lines += [f"{begin} {row(built)} |" for built in build(case)]
    return "\n".join(lines)


def row(built: Built) -> str:
    """Cells of one kernel."""
    counts = (built.wgmma_count, built.shared_bytes, built.registers_count, built.stack_bytes)
    return " | ".join([f"`{built.kernel}`", *(f"{count:,}" for count in counts)])


if __name__ == "__main__":
    main(sys.argv[1:])
