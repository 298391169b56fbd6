"""What a DeepSeek-V2 or V3 checkpoint says about itself, checked once and trusted afterwards.

`ModelConfig.from_huggingface` is the one place that knows the names of a Hugging Face config.json. What this
project cannot compute exactly as the checkpoint means it is refused here with `ModelConfigError`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from kernels.model.fields import SIZE_MAX, Fields, ModelConfigError, read_fields, shown

__all__ = ["GateConfig", "ModelConfig", "ModelConfigError", "RopeConfig", "WeightFormat", "YarnConfig"]

LAYERS_COUNT_MAX = 256
EXPERTS_COUNT_MAX = 2048

FAMILIES = {"deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3"}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
GATE_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}
GATE_SCORINGS = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
SPARSE_ATTENTION_FIELDS = ("index_topk", "index_n_heads", "index_head_dim")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN's stretch of the rotary frequencies; `attention_factor` None means derived from the mscales."""

    factor: float
    original_positions_max: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `interleaved` rotates dimensions (0, 1), (2, 3), ...; otherwise (0, d/2), ..."""

    theta: float
    interleaved: bool = True
    yarn: YarnConfig | None = None


@dataclass(frozen=True)
class GateConfig:
    """How a token chooses its experts, and how the chosen scores become weights."""

    scoring: str
    method: str
    experts_per_token: int
    groups_count: int
    groups_per_token: int
    normalised: bool
    scaling: float
    has_bias: bool


@dataclass(frozen=True)
class WeightFormat:
    """How linear weights are stored; `block` is (rows, columns) for each scale when quantised to fp8."""

    dtype: str
    quantisation: str = "none"
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and choices of one model of the DeepSeek-V2 or V3 family."""

    family: str
    vocab_size: int
    hidden_size: int
    layers_count: int
    dense_layers_count: int
    intermediate_size: int
    moe_intermediate_size: int
    heads_count: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    positions_max: int
    rope: RopeConfig
    gate: GateConfig | None
    routed_experts_count: int
    shared_experts_count: int
    tied_head: bool
    attention_bias: bool
    weight_format: WeightFormat
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    next_token_layers_count: int

    @property
    def latent_dim(self) -> int:
        """Numbers kept for one token and layer: the compressed latent, then the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def latent_norm_eps(self) -> float:
        """Epsilon of the norms over the q and kv latents, the same whatever rms_norm_eps says."""
        return 1e-6

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that route to experts; empty for a dense model."""
        return range(self.dense_layers_count, self.layers_count)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` routes its tokens to experts rather than through one dense MLP."""
        return layer in self.moe_layers

    @staticmethod
    def from_huggingface(document: dict) -> "ModelConfig":
        """Read a parsed config.json in the spelling of transformers 4 or 5; raises ModelConfigError."""
        fields = Fields(document)
        family = _read_family(fields)
        _refuse_unsupported(fields)
        return _read_model(fields, family)

    @staticmethod
    def from_folder(folder: Path) -> "ModelConfig":
        """Read `folder`/config.json, adding the end-of-text ids of generation_config.json if it is there."""
        config = ModelConfig.from_huggingface(read_fields(Path(folder) / "config.json").values)
        generation_path = Path(folder) / "generation_config.json"
        if not generation_path.exists():
            return config
        ids = read_fields(generation_path).token_ids("eos_token_id", config.vocab_size)
        return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ids))))


def _read_family(fields: Fields) -> str:
    sparse = [name for name in SPARSE_ATTENTION_FIELDS if fields.get(name) is not None]
    if fields.get("model_type") == "deepseek_v32" or sparse:
        field = sparse[0] if sparse else "model_type"
        remedy = "use a V2, V3, R1, V3.1, Moonlight or Kimi-K2 checkpoint"
        raise fields.refuse(field, "asks for the sparse attention of DeepSeek-V3.2", remedy)
    family = FAMILIES[fields.choice("model_type", tuple(FAMILIES))]
    listed, supported = fields.get("architectures"), [ARCHITECTURES[family]]
    if listed != supported:
        problem = "is missing" if listed is None else f"is {shown(listed)}"
        raise fields.refuse("architectures", problem, f"supported with this model_type: {supported}")
    return family


def _refuse_unsupported(fields: Fields) -> None:
    if (act := fields.get("hidden_act")) not in (None, "silu"):
        raise fields.refuse("hidden_act", f"is {shown(act)}", "supported: silu")
    if (frequency := fields.get("moe_layer_freq")) not in (None, 1):
        remedy = "supported: 1 (experts in every layer after the dense ones)"
        raise fields.refuse("moe_layer_freq", f"is {shown(frequency)}", remedy)
    if fields.flag("mlp_bias", False):
        raise fields.refuse("mlp_bias", "is true", "supported: false")


def _read_model(fields: Fields, family: str) -> ModelConfig:
    layers_count = fields.size("num_hidden_layers", maximum=LAYERS_COUNT_MAX)
    experts_count = fields.nullable_size("n_routed_experts", minimum=0, maximum=EXPERTS_COUNT_MAX) or 0
    dense_count = layers_count
    if experts_count:
        dense_count = min(layers_count, fields.size("first_k_dense_replace", minimum=0))
    has_moe = dense_count < layers_count
    vocab_size = fields.size("vocab_size")
    bos_token_ids = fields.token_ids("bos_token_id", vocab_size)
    mtp_name = "num_mtp_layers" if fields.get("num_mtp_layers") is not None else "num_nextn_predict_layers"
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=fields.size("hidden_size"),
        layers_count=layers_count,
        dense_layers_count=dense_count,
        intermediate_size=fields.size("intermediate_size"),
        moe_intermediate_size=fields.size("moe_intermediate_size") if has_moe else 0,
        heads_count=_read_heads_count(fields),
        q_lora_rank=fields.nullable_size("q_lora_rank"),
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_nope_head_dim=fields.size("qk_nope_head_dim"),
        qk_rope_head_dim=_read_rope_dim(fields),
        v_head_dim=fields.size("v_head_dim"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        positions_max=fields.size("max_position_embeddings"),
        rope=_read_rope(fields, family),
        gate=_read_gate(fields, family, experts_count) if has_moe else None,
        routed_experts_count=experts_count if has_moe else 0,
        shared_experts_count=_read_shared_experts_count(fields) if has_moe else 0,
        tied_head=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        weight_format=_read_weight_format(fields),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        next_token_layers_count=fields.size(mtp_name, minimum=0, maximum=LAYERS_COUNT_MAX, default=0),
    )


def _read_shared_experts_count(fields: Fields) -> int:
    return fields.nullable_size("n_shared_experts", minimum=0, maximum=EXPERTS_COUNT_MAX) or 0


def _read_heads_count(fields: Fields) -> int:
    heads_count = fields.size("num_attention_heads")
    if fields.get("num_key_value_heads") not in (None, heads_count):
        problem = f"is {shown(fields.get('num_key_value_heads'))}, not num_attention_heads ({heads_count})"
        raise fields.refuse("num_key_value_heads", problem, "every query head has its own key in this family")
    return heads_count


def _read_rope_dim(fields: Fields) -> int:
    rope_dim = fields.size("qk_rope_head_dim", minimum=2)
    if rope_dim % 2:
        raise fields.refuse("qk_rope_head_dim", f"is {rope_dim}", "give an even number: pairs are rotated")
    return rope_dim


def _read_rope(fields: Fields, family: str) -> RopeConfig:
    """transformers 5 writes `rope_parameters` with theta inside, earlier ones `rope_scaling` beside theta."""
    given = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name) is not None]
    if len(given) == 2:
        raise fields.refuse("rope_scaling", "is given beside rope_parameters", "keep one of the two")
    rope = fields.nested(given[0]) if given else Fields({}, "rope_parameters.")
    for source in (fields, rope):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise source.refuse("partial_rotary_factor", "is not 1", "give the width as qk_rope_head_dim")
    interleaved = fields.flag("rope_interleave", True)
    if family == "deepseek_v2" and not interleaved:
        raise fields.refuse("rope_interleave", "is false", "supported for deepseek_v2: true")
    theta_source = rope if rope.get("rope_theta") is not None else fields
    return RopeConfig(theta_source.positive("rope_theta", 10000.0), interleaved, _read_yarn(rope))


def _read_yarn(rope: Fields) -> YarnConfig | None:
    name = "rope_type" if rope.get("rope_type") is not None else "type"
    if rope.choice(name, ("default", "yarn"), default="default") == "default":
        return None
    return YarnConfig(
        factor=rope.number("factor", minimum=1.0),
        original_positions_max=rope.size("original_max_position_embeddings"),
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        attention_factor=None if rope.get("attention_factor") is None else rope.positive("attention_factor"),
        truncate=rope.flag("truncate", True),
    )


def _read_gate(fields: Fields, family: str, experts_count: int) -> GateConfig:
    """transformers 5 does not write `scoring_func` and `topk_method`: the family then decides."""
    methods = GATE_METHODS[family]
    method = fields.choice("topk_method", methods, default=methods[0])
    grouped = method != "greedy"
    gate = GateConfig(
        scoring=fields.choice("scoring_func", (GATE_SCORINGS[family],), default=GATE_SCORINGS[family]),
        method=method,
        experts_per_token=fields.size("num_experts_per_tok", maximum=experts_count),
        groups_count=fields.size("n_group", maximum=experts_count) if grouped else 1,
        groups_per_token=fields.size("topk_group", maximum=experts_count) if grouped else 1,
        normalised=fields.flag("norm_topk_prob", family == "deepseek_v3"),
        scaling=fields.positive("routed_scaling_factor", 2.5 if family == "deepseek_v3" else 1.0),
        has_bias=method == "noaux_tc",
    )
    if family == "deepseek_v2" and gate.normalised:
        # Public implementations disagree here: one normalises instead of scaling, another never normalises.
        raise fields.refuse("norm_topk_prob", "is true", "supported for deepseek_v2: false")
    _check_groups(fields, gate, experts_count)
    return gate


def _check_groups(fields: Fields, gate: GateConfig, experts_count: int) -> None:
    if experts_count % gate.groups_count:
        problem = f"is {gate.groups_count}, which does not divide n_routed_experts ({experts_count})"
        raise fields.refuse("n_group", problem, "give a divisor of n_routed_experts")
    group_size = experts_count // gate.groups_count
    if gate.method == "noaux_tc" and group_size < 2:
        raise fields.refuse("n_group", "leaves one expert in a group", "give groups of two experts or more")
    if gate.groups_per_token > gate.groups_count:
        problem = f"is {gate.groups_per_token}, more than n_group ({gate.groups_count})"
        raise fields.refuse("topk_group", problem, "give at most n_group")
    if gate.experts_per_token > gate.groups_per_token * group_size:
        problem = f"is {gate.experts_per_token}, more than {gate.groups_per_token} groups of {group_size}"
        raise fields.refuse("num_experts_per_tok", problem, "choose fewer experts or raise topk_group")


def _read_weight_format(fields: Fields) -> WeightFormat:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    dtype = fields.choice(name, ("bfloat16", "float16", "float32"), default="float32")
    for other in ("compression_config", "quantization"):
        if fields.get(other) is not None:
            raise fields.refuse(other, "is given", "supported: quantization_config with quant_method fp8")
    if fields.get("quantization_config") is None:
        return WeightFormat(dtype)
    quantisation = fields.nested("quantization_config")
    quantisation.choice("quant_method", ("fp8",))
    quantisation.choice("fmt", ("e4m3",), default="e4m3")
    quantisation.choice("activation_scheme", ("dynamic",), default="dynamic")
    return WeightFormat(dtype, "fp8", _read_block(quantisation))


def _read_block(quantisation: Fields) -> tuple[int, int]:
    name = "weight_block_size"
    value = quantisation.get(name)
    whole = isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    if not whole or not all(1 <= side <= SIZE_MAX for side in value):
        raise quantisation.refuse(name, f"is {shown(value)}", "give [rows, columns], as in [128, 128]")
    return value[0], value[1]
