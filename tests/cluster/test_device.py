"""What a process computes on, and that what it cannot compute there is refused."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import device as device_module
from cluster.config import check_config
from cluster.device import check_numbers, device_of
from cluster.errors import InvalidConfig
from kernels.model.config import ModelConfig

FOLDER = Path("examples/trivium-small")


def configured(tmp_path: Path, **model: str):
    """A configuration with a model's settings."""
    return check_config({"model": {"folder": str(FOLDER.resolve()), **model}}, "test", tmp_path)


@pytest.mark.parametrize(
    ("asked", "has_gpu", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_process_computes_on_its_gpu_unless_told_not_to(tmp_path, monkeypatch, asked, has_gpu, device):
    monkeypatch.setattr(device_module.torch.cuda, "is_available", lambda: has_gpu)
    config = configured(tmp_path, device=asked)
    assert device_of(config) == device


def test_a_gpu_that_is_not_there_is_asked_for_by_resources(tmp_path, monkeypatch):
    monkeypatch.setattr(device_module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidConfig, match="no GPU") as caught:
        device_of(configured(tmp_path, device="cuda"))
    assert caught.value.field == "model.device" and "resources" in caught.value.remedy


@pytest.mark.parametrize(
    ("dtype", "heads_count", "device", "is_refused"),
    [
        ("float32", 128, "cuda", True),
        ("float32", 16, "cuda", False),
        ("float32", 128, "cpu", False),
        ("bfloat16", 128, "cuda", False),
    ],
)
def test_float32_on_a_gpu_is_for_few_heads(tmp_path, dtype, heads_count, device, is_refused):
    config = configured(tmp_path, compute_dtype=dtype)
    model = replace(ModelConfig.from_folder(FOLDER), heads_count=heads_count)
    with pytest.raises(InvalidConfig, match="float32") if is_refused else nullcontext():
        check_numbers(model, config, device)
