"""One thread, one seed for each test, and no process left behind."""

import os
import random
import uuid
import zlib

import numpy
import pytest
import torch
from hypothesis import settings

from tests.processes import MARK, processes_left

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from kernels.ops.backend import triton

    triton.knobs.runtime.interpret = True  # which sets the variable too
    del os.environ["TRITON_INTERPRET"]  # for this process alone, not for those that it starts

LEAVING_TIMEOUT_S = 15.0

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Mark every process that the tests will start, through the environment that it inherits."""
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # which a worker of several has: tables are as wide as a test says
    os.environ[MARK] = uuid.uuid4().hex


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run first what needs Ray: it forks as it starts, which gRPC's threads of other tests do not bear.

    Tests of kernels run on the GPU where there is one, and are then found by `-m gpu`.
    """
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)
    for item in items:
        if torch.cuda.is_available() and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every source of random numbers with the test's name, which also names the failure to repeat."""
    number = zlib.crc32(request.node.nodeid.encode())
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)
    return number


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU, on which Triton interprets them."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a process that it started outlives it."""
    left = processes_left(os.environ[MARK], timeout_s=LEAVING_TIMEOUT_S)
    if not left:
        return
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(f"\nERROR: the tests left {len(left)} processes behind:", red=True)
    for process_id, command in left.items():
        reporter.write_line(f"  {process_id} {command}")
