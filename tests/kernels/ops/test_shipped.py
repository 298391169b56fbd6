"""Every kernel as shipped compiles for Hopper: WGMMA where it must be, memory that is there, no spills."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.ops.shipping import SHARED_BYTES_MAX, cases_of, module_names

CASES = [(name, title) for name in module_names() for title in cases_of(name)]
COMPILERS_COUNT = 2
TIMEOUT_S = 600


@pytest.fixture(scope="session")
def built() -> dict[str, dict[str, list[dict]]]:
    """What the compiler made of every case, by module and title."""
    names = sorted(module_names(), key=lambda name: -len(cases_of(name)))
    compilers = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "tests.kernels.ops.shipping",
                *names[index::COMPILERS_COUNT],
            ],
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "0"},
        )
        for index in range(COMPILERS_COUNT)
    ]
    told = [compiler.communicate(timeout=TIMEOUT_S)[0] for compiler in compilers]
    assert all(compiler.returncode == 0 for compiler in compilers)
    return {name: cases for part in told for name, cases in json.loads(part).items()}


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(("name", "title"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_shipped_kernel_fits_the_chip(name, title, built):
    kernels, case = built[name][title], cases_of(name)[title]
    assert kernels
    assert case.wgmma <= {kernel["kernel"] for kernel in kernels if kernel["wgmma_count"]}
    assert case.barriers <= {kernel["kernel"] for kernel in kernels if kernel["barriers_count"]}
    for kernel in kernels:
        assert kernel["mma_count"] == 0 or kernel["kernel"] not in case.wgmma, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES_MAX, kernel
        assert kernel["stack_bytes"] == 0, kernel
