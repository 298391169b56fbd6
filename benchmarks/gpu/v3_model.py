"""DeepSeek-V3's shape with few layers and random weights, made on the device: no checkpoint.

Weights of projections are FP8 with a scale for each 128 x 128, as published; norms, the gate, the embedding
and the head are bfloat16. Scales are such that weights have a trained model's spread.
"""

import copy

import torch

from benchmarks.gpu.banks import SCALE, random_bank
from benchmarks.gpu.draw import TILE_ROWS, normal, tiled_rows
from benchmarks.gpu.work import FP8, blocks
from experts.banked import BankedExperts
from experts.local import Computed
from kernels.model.config import ModelConfig
from kernels.model.latent_cache import LatentCache
from kernels.model.pages import PAGE_TOKENS
from kernels.model.tensor_names import GATE_BIAS_SUFFIX, attention_half_shapes
from kernels.model.transformer import Transformer
from kernels.ops.latent_format import pack_latents_reference
from kernels.ops.linear_fp8 import Fp8Weight
from kernels.ops.projection import Weight

WHOLE_LAYERS, WHOLE_DENSE = 61, 3
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
TINY = V3 | {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}


class SilentExperts:
    """Experts elsewhere that answer at once and cost nothing: what is left is the node's own half."""

    is_recordable = True

    def __init__(self, tokens_max: int, hidden: int, device: torch.device):
        self._answer = torch.zeros(tokens_max, hidden, device=device)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> Computed:
        """Zeros, `[tokens, hidden]` float32."""
        return Computed(self._answer[: len(hidden)])


def truncated_config(document: dict, layers: int, dense: int) -> ModelConfig:
    """The model of a config.json with fewer layers, of which the first are dense."""
    cut = {"num_hidden_layers": layers, "first_k_dense_replace": dense}
    return ModelConfig.from_huggingface(document | cut)


def random_transformer(config: ModelConfig, device: torch.device) -> Transformer:
    """Everything but the routed experts, plugged into those of `random_experts`."""
    weights = {
        name: random_weight(name, shape, device) for name, shape in attention_half_shapes(config).items()
    }
    return Transformer(config, weights, random_experts(config, device), device)


def random_weight(name: str, shape: tuple[int, ...], device: torch.device) -> Weight:
    """A weight in the type that its name has in the published checkpoint."""
    if "_proj" in name:
        scales = torch.full((blocks(shape[0]), blocks(shape[1])), SCALE, device=device)
        return Fp8Weight(normal(shape, torch.float8_e4m3fn, device), scales)
    if name.endswith(GATE_BIAS_SUFFIX):
        return SCALE * normal(shape, torch.float32, device)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return SCALE * normal(shape, torch.bfloat16, device)


def random_experts(config: ModelConfig, device: torch.device) -> BankedExperts:
    """All experts of all layers in this process."""
    sizes = (config.routed_experts_count, config.hidden_size, config.moe_intermediate_size)
    return BankedExperts(config, {layer: random_bank(*sizes, FP8, device) for layer in config.moe_layers})


def first_layers(transformer: Transformer, count: int) -> Transformer:
    """The same weights, of the first layers alone."""
    shorter = copy.copy(transformer)
    shorter.layers = transformer.layers[:count]
    return shorter


def filled_cache(transformer: Transformer, pages: int, packs_latents: bool) -> LatentCache:
    """Pages that hold random latents, as if prompts had been there."""
    layout = transformer.latent_layout(packs_latents)
    layers, device = transformer.config.layers_count, transformer.device
    cache = LatentCache(layers, layout, layers * pages * PAGE_TOKENS * layout.row_bytes, device)
    rows_count = cache.latents.shape[1]
    rows = normal((min(TILE_ROWS, rows_count), transformer.config.latent_dim), torch.bfloat16, device)
    rows = pack_latents_reference(rows, layout.value_dim) if layout.is_packed else rows
    for layer in cache.latents:
        layer.copy_(tiled_rows(rows, rows_count))
    return cache
