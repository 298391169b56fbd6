"""Small configurations in transformers' form and ours, and weights drawn for them."""

import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config

from kernels.model.attention import LatentAttention, Rotation
from kernels.model.config import ModelConfig

SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 4096,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def configs(family: str = "deepseek_v3", **values) -> tuple[DeepseekV2Config | DeepseekV3Config, ModelConfig]:
    """The same small model, as transformers and as we describe it."""
    kind = DeepseekV2Config if family == "deepseek_v2" else DeepseekV3Config
    theirs = kind(**(SMALL | values))
    theirs._attn_implementation = "eager"
    architecture = "DeepseekV2ForCausalLM" if family == "deepseek_v2" else "DeepseekV3ForCausalLM"
    return theirs, ModelConfig.from_huggingface(theirs.to_dict() | {"architectures": [architecture]})


def draw_weights(module: nn.Module) -> None:
    """Give a module random weights, norms near 1."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            drawn = torch.randn_like(weight)
            weight.copy_(1 + 0.1 * drawn if "norm" in name else drawn * 0.3)


def compressed(
    attention: LatentAttention, hidden: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and latents `[tokens, latent_dim]` as a cache would hold them."""
    queries, fresh = attention.compress(hidden, rotation)
    rows = torch.empty_like(fresh)
    attention.store(fresh, rotation, rows, torch.arange(len(rows)))
    return queries, rows
