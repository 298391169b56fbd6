"""What a pod does before its end, against a Ray that only remembers."""

import importlib.util
from types import SimpleNamespace

import pytest

from tests.helm.rendering import CHART

ALIVE, DEAD = 0, 1
FINISH_S, REPLACEMENT_S = 600, 120


@pytest.fixture(scope="module")
def leaving():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("leave", CHART / "files/leave.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeRay:
    """Two nodes; the one that is drained is gone after `gone_s`, and time passes only in sleep."""

    def __init__(self, gone_s: float = 30.0, draining_s: float = 0.0):
        self.now_s = 1_000_000.0
        self.start_s, self.gone_s, self.draining_s = self.now_s, gone_s, draining_s
        self.drained = []
        self.nodes = {
            b"head": SimpleNamespace(instance_id="head-pod", state=ALIVE, is_head_node=True),
            b"work": SimpleNamespace(instance_id="work-pod", state=ALIVE, is_head_node=False),
        }

    def sleep(self, seconds):
        self.now_s += seconds
        if self.drained and self.now_s - self.start_s >= self.gone_s:
            self.nodes[b"work"].state = DEAD

    def get_all_node_info(self, timeout):
        return self.nodes

    def get_draining_nodes(self, timeout):
        return {"work": 0} if self.now_s - self.start_s < self.draining_s else {}

    def drain_node(self, node_id, reason, message, deadline_ms, timeout):
        self.drained.append((node_id, reason, deadline_ms))
        return True, ""

    def leave(self, leaving, pod):
        leaving.leave(self, pod, FINISH_S, REPLACEMENT_S, clock=lambda: self.now_s, sleep=self.sleep)
        return self.now_s - self.start_s


def test_a_worker_drains_its_own_node_and_waits_until_it_is_gone(leaving):
    ray = FakeRay(gone_s=30.0)
    assert ray.leave(leaving, "work-pod") == pytest.approx(30.0, abs=2.0)
    [(node_id, reason, deadline_ms)] = ray.drained
    assert node_id == b"work".hex()
    assert reason == leaving.autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
    assert deadline_ms == (ray.start_s + FINISH_S + REPLACEMENT_S) * 1000


def test_a_worker_that_does_not_empty_leaves_when_the_time_is_up(leaving):
    waited_s = FakeRay(gone_s=1e9).leave(leaving, "work-pod")
    assert waited_s == pytest.approx(FINISH_S + REPLACEMENT_S, abs=2.0)


def test_a_node_that_ray_does_not_know_leaves_at_once(leaving):
    ray = FakeRay()
    assert ray.leave(leaving, "another-pod") == 0.0
    assert ray.drained == []


def test_the_head_stays_while_others_drain_and_is_never_drained(leaving):
    ray = FakeRay(draining_s=100.0)
    assert ray.leave(leaving, "head-pod") == pytest.approx(100.0, abs=2.0)
    assert ray.drained == []
    assert FakeRay().leave(leaving, "head-pod") == leaving.HEAD_PAUSE_S
