"""The checkpoint that all engines are measured on: 19 M parameters, six layers, 32 experts, real latents."""

from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SEED = 20
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 192,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 8192,
}


def make_model(folder: Path) -> Path:
    """Write the checkpoint where it is not there yet."""
    if not (folder / "config.json").exists():
        torch.manual_seed(SEED)
        config = DeepseekV3Config(
            **SIZES, initializer_range=0.05, eos_token_id=1, bos_token_id=0, pad_token_id=0
        )
        DeepseekV3ForCausalLM(config).save_pretrained(folder, max_shard_size="32MB")
    return folder


def prompts(count: int, tokens_count: int) -> list[list[int]]:
    """Random prompts, the same in every run."""
    chance = torch.Generator().manual_seed(SEED)
    return torch.randint(2, SIZES["vocab_size"], (count, tokens_count), generator=chance).tolist()
