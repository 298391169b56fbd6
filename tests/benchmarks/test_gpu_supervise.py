"""Processes that die, hang, or cannot begin: what was measured stays, and another process goes on."""

import json
import sys
import time

import pytest

from benchmarks.gpu.supervise import supervise

CASES = ("a 1", "a 2", "b 1")
PROCESS = """
import json, os, signal, sys, time
notes, skipped, plan = sys.argv[1], json.load(open(sys.argv[2])), json.loads(sys.argv[3])
def note(line):
    with open(notes, "a") as file:
        file.write(json.dumps(line) + chr(10))
if plan.get("start") == "dies":
    sys.exit(7)
for case in plan["cases"]:
    if [case, "ours"] in skipped:
        continue
    operation, sizes = case.split()
    for who in ("ours", "peer"):
        if [operation, who] in skipped:
            continue
        note({"begins": [case, who]})
        what = plan.get(case + " " + who)
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hangs":
            time.sleep(60)
    note({"operation": operation, "sizes": sizes, "us": 1.0})
    if plan.get(case + " after") == "dies":
        sys.exit(1)
"""


@pytest.fixture
def supervised(tmp_path):
    """What comes of processes that follow a plan: results by case, and what was told."""

    def run(plan: dict, stall_s: float = 20.0) -> tuple[dict[str, dict], list[dict]]:
        told: list[dict] = []

        def command(skipped):
            given = json.dumps(plan | {"cases": CASES})
            return [sys.executable, "-c", PROCESS, str(tmp_path / "notes"), str(skipped), given]

        results = supervise(command, tmp_path, stall_s, time.time() + 60, told.append)
        assert [line for line in told if line["operation"] != "-"] == results
        return {f"{line['operation']} {line['sizes']}": line for line in results}, told

    return run


def test_a_process_that_ends_well_is_the_only_one(supervised):
    results, _ = supervised({})
    assert list(results) == list(CASES)


def test_a_case_that_kills_its_process_is_told_and_the_rest_is_run(supervised):
    results, _ = supervised({"a 2 ours": "dies"})
    assert set(results) == set(CASES)
    assert results["a 2"]["failed"] == "the process ended with -9"
    assert results["b 1"]["us"] == 1.0


def test_a_case_that_hangs_is_given_up(supervised):
    results, _ = supervised({"a 1 ours": "hangs"}, stall_s=1.5)
    assert results["a 1"]["failed"] == "nothing came for 2 s"
    assert results["a 2"]["us"] == results["b 1"]["us"] == 1.0


def test_a_peer_that_kills_costs_no_case(supervised):
    results, _ = supervised({"a 1 peer": "dies", "a 2 peer": "dies"})
    assert [results[case]["us"] for case in CASES] == [1.0, 1.0, 1.0]


def test_a_process_that_dies_between_cases_is_followed_by_another(supervised):
    results, _ = supervised({"a 1 after": "dies"})
    assert list(results) == list(CASES)


def test_a_process_that_never_begins_is_told_once(supervised):
    results, told = supervised({"start": "dies"})
    assert results == {}
    assert told == [
        {"operation": "-", "sizes": "-", "failed": "the process ended with 7 before any case began"}
    ]
