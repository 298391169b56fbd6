"""The guard that fails a run which leaves processes behind must itself see them."""

import os
import subprocess
import sys

from tests.processes import MARK, processes_left

SLEEP = "import time; time.sleep(60)"

LEAVE_A_SLEEPER = f"""
import subprocess, sys
quiet = subprocess.DEVNULL
print(subprocess.Popen([sys.executable, "-c", {SLEEP!r}], stdout=quiet, stderr=quiet).pid)
"""


def test_a_living_child_is_found_and_a_dead_one_is_not():
    child = subprocess.Popen([sys.executable, "-c", SLEEP], env=os.environ | {MARK: "not this run's"})
    try:
        assert SLEEP in processes_left(os.environ[MARK])[child.pid]
    finally:
        child.kill()
        child.wait()
    assert child.pid not in processes_left(os.environ[MARK])


def test_an_orphan_is_found_by_its_mark():
    environment = os.environ | {MARK: "an orphan of this test", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", LEAVE_A_SLEEPER]
    parent = subprocess.run(command, env=environment, capture_output=True, check=True)
    orphan = int(parent.stdout)
    try:
        assert orphan in processes_left("an orphan of this test")
    finally:
        os.kill(orphan, 9)
