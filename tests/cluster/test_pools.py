"""What a Serve config file builds, as far as no Ray is needed for it."""

import hashlib
import threading

import pytest

from cluster import pools
from cluster.errors import InvalidConfig

TEXT = "model: {folder: examples/trivium-small}\ntransport: {scheme: tcp, host: auto}\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_announced_file_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "REVISION_POLL_S", 0.01)
    path = tmp_path / "cluster.yaml"
    path.write_text("an older one")
    writing = threading.Timer(0.1, path.write_text, [TEXT])
    writing.start()
    pools.wait_for_revision(path, digest(TEXT), timeout_s=10)
    writing.join()
    assert path.read_text() == TEXT


def test_another_file_than_announced_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "REVISION_POLL_S", 0.01)
    path = tmp_path / "cluster.yaml"
    with pytest.raises(InvalidConfig, match="not the one that was announced"):
        pools.wait_for_revision(path, digest(TEXT), timeout_s=0.05)


def test_a_file_without_revision_is_taken_as_it_is(tmp_path):
    pools.wait_for_revision(tmp_path / "nothing", None)


def test_an_application_has_a_deployment_for_each_pool(tmp_path):
    (tmp_path / "examples").symlink_to("/".join(__file__.split("/")[:-3]) + "/examples")
    path = tmp_path / "cluster.yaml"
    path.write_text(TEXT + "prefill: {resources: {trivium_prefill: 1, GPU: 1}}\n")
    built = pools.configured({"config": str(path), "revision": digest(path.read_text())})
    assert built._bound_deployment.name == "gateway"
    nodes = {
        one._bound_deployment.name: one._bound_deployment for one in built._bound_deployment.init_args[2:]
    }
    assert set(nodes) == {"prefill", "decode", "experts"}
    assert nodes["prefill"].ray_actor_options["num_gpus"] == 1
    assert nodes["prefill"].ray_actor_options["resources"] == {"trivium_prefill": 1}
    assert nodes["decode"].ray_actor_options["num_gpus"] == 0
    settings = nodes["prefill"].ray_actor_options["runtime_env"]["env_vars"]
    assert settings == {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "NCCL_MAX_CTAS": "2"}
    assert "env_vars" not in (nodes["decode"].ray_actor_options.get("runtime_env") or {})
