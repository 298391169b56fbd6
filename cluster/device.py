"""What a process computes on, and what it can compute there."""

import torch

from cluster.config import ClusterConfig
from cluster.errors import InvalidConfig
from kernels.model.config import ModelConfig

FLOAT32_HEADS_MAX = 16


def device_of(config: ClusterConfig) -> str:
    """Where this process computes: on its GPU if it has one and may; raises InvalidConfig."""
    has_gpu = torch.cuda.is_available()
    if config.model.device == "cuda" and not has_gpu:
        raise InvalidConfig(
            reason="NO_GPU",
            message="model.device is cuda, but this process has no GPU",
            field="model.device",
            remedy="Give each pool resources, such as {GPU: 1}, where hosts have them; or set device: auto.",
        )
    return "cuda" if has_gpu and config.model.device != "cpu" else "cpu"


def check_numbers(model: ModelConfig, config: ClusterConfig, device: str) -> None:
    """Attention in float32 over V3's many heads has no room on a GPU's processor; raises InvalidConfig."""
    if device == "cuda" and config.model.compute_dtype == "float32" and model.heads_count > FLOAT32_HEADS_MAX:
        raise InvalidConfig(
            reason="FLOAT32_ON_GPU",
            message=f"float32 on a GPU is for {FLOAT32_HEADS_MAX} heads, the model has {model.heads_count}",
            field="model.compute_dtype",
            limit=str(FLOAT32_HEADS_MAX),
            remedy="Set compute_dtype: bfloat16, or device: cpu.",
        )
