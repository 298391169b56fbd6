"""Every tensor that a checkpoint of the family must hold, by its Hugging Face name, with its shape.

The attention half is all but the routed experts: what a prefill or decode node loads. Published checkpoints
and those that transformers writes agree: on disk each expert's projection is a tensor of its own.
"""

from kernels.model.config import ModelConfig

Shape = tuple[int, ...]

SCALE_SUFFIX = "_scale_inv"
GATE_BIAS_SUFFIX = ".mlp.gate.e_score_correction_bias"


def attention_half_names(config: ModelConfig) -> list[str]:
    """Names of all weights except the routed experts, in the order in which a token meets them."""
    return list(attention_half_shapes(config))


def expert_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """Names of the gate, up and down projection of one routed expert; raises ValueError outside the model."""
    if not config.is_moe_layer(layer) or not 0 <= expert < config.routed_experts_count:
        raise ValueError(
            f"layer {layer}, expert {expert}: experts are in layers {config.moe_layers.start} to "
            f"{config.moe_layers.stop - 1}, numbered 0 to {config.routed_experts_count - 1}"
        )
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes `[out, in]` of all weights, routed experts included, before any quantisation scales."""
    shapes = attention_half_shapes(config)
    up = (config.moe_intermediate_size, config.hidden_size)
    down = up[::-1]
    for layer in config.moe_layers:
        for expert in range(config.routed_experts_count):
            shapes.update(zip(expert_names(config, layer, expert), (up, up, down), strict=True))
    return shapes


def attention_half_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of all weights except the routed experts, by name."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.layers_count):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (config.hidden_size,)
        shapes |= _attention_shapes(config, f"{prefix}.self_attn")
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (config.hidden_size,)
        shapes |= _mlp_half_shapes(config, layer, f"{prefix}.mlp")
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _attention_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if config.attention_bias else ()
    shapes: dict[str, Shape] = {}
    for name, shape in _attention_weights(config).items():
        shapes[f"{prefix}.{name}.weight"] = shape
        if name in biased:
            shapes[f"{prefix}.{name}.bias"] = shape[:1]
    return shapes


def _attention_weights(config: ModelConfig) -> dict[str, Shape]:
    queries, hidden = config.heads_count * config.qk_head_dim, config.hidden_size
    keys_and_values = config.heads_count * (config.qk_nope_head_dim + config.v_head_dim)
    weights: dict[str, Shape] = {"q_proj": (queries, hidden)}
    if config.q_lora_rank is not None:
        rank = config.q_lora_rank
        weights = {"q_a_proj": (rank, hidden), "q_a_layernorm": (rank,), "q_b_proj": (queries, rank)}
    return weights | {
        "kv_a_proj_with_mqa": (config.latent_dim, hidden),
        "kv_a_layernorm": (config.kv_lora_rank,),
        "kv_b_proj": (keys_and_values, config.kv_lora_rank),
        "o_proj": (hidden, config.heads_count * config.v_head_dim),
    }


def _mlp_half_shapes(config: ModelConfig, layer: int, prefix: str) -> dict[str, Shape]:
    if not config.is_moe_layer(layer):
        return _mlp_shapes(prefix, config.hidden_size, config.intermediate_size)
    shapes: dict[str, Shape] = {f"{prefix}.gate.weight": (config.routed_experts_count, config.hidden_size)}
    if config.gate is not None and config.gate.has_bias:
        shapes[f"{prefix}.gate.e_score_correction_bias"] = (config.routed_experts_count,)
    if config.shared_experts_count:
        # Shared experts are stored as one MLP, as wide as all of them together.
        width = config.shared_experts_count * config.moe_intermediate_size
        shapes |= _mlp_shapes(f"{prefix}.shared_experts", config.hidden_size, width)
    return shapes


def _mlp_shapes(prefix: str, hidden_size: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden_size),
        f"{prefix}.up_proj.weight": (width, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, width),
    }
