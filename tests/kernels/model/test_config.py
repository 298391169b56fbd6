"""The published members of the family load; what would run wrong is refused, naming the field."""

import json
import math

import pytest

from kernels.model.config import ModelConfig, ModelConfigError, WeightFormat, YarnConfig
from kernels.model.tensor_names import expected_shapes

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

V2 = HEADS | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
V2_LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
V3 = V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "quantization_config": FP8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
V3_1 = V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}
MOONLIGHT = {
    name: value for name, value in V3.items() if name not in ("quantization_config", "rope_scaling")
} | {
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 8192,
    "rope_theta": 50000.0,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "num_nextn_predict_layers": 0,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
}
V3_2 = V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
PUBLISHED = {
    "V2": V2,
    "V2-Lite": V2_LITE,
    "V3": V3,
    "R1": V3,
    "V3.1": V3_1,
    "Moonlight-16B-A3B": MOONLIGHT,
    "Kimi-K2": KIMI_K2,
}


PARAMETERS_B = {"V2": 236, "V2-Lite": 15.7, "V3": 671, "Moonlight-16B-A3B": 16, "Kimi-K2": 1026}


@pytest.mark.parametrize("name", PARAMETERS_B)
def test_shapes_add_up_to_the_published_size(name):
    shapes = expected_shapes(ModelConfig.from_huggingface(PUBLISHED[name])).values()
    assert sum(map(math.prod, shapes)) == pytest.approx(PARAMETERS_B[name] * 1e9, rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_config_loads(name):
    config = ModelConfig.from_huggingface(PUBLISHED[name])
    assert (config.latent_dim, config.qk_head_dim) == (576, 192)
    assert config.layers_count == PUBLISHED[name]["num_hidden_layers"]
    assert config.gate.experts_per_token == PUBLISHED[name]["num_experts_per_tok"]
    assert config.rope.interleaved


def test_v3_in_full():
    config = ModelConfig.from_huggingface(V3)
    assert config.family == "deepseek_v3"
    assert config.moe_layers == range(3, 61)
    assert [config.is_moe_layer(layer) for layer in (2, 3, 60, 61)] == [False, True, True, False]
    gate = config.gate
    assert (gate.scoring, gate.method, gate.has_bias, gate.normalised) == ("sigmoid", "noaux_tc", True, True)
    assert (gate.groups_count, gate.groups_per_token, gate.scaling) == (8, 4, 2.5)
    assert config.weight_format == WeightFormat("bfloat16", "fp8", (128, 128))
    assert config.rope.yarn == YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0, None, True)
    assert (config.eos_token_ids, config.bos_token_id, config.next_token_layers_count) == ((1,), 0, 1)


def test_v2_gates_use_softmax_without_bias():
    gate = ModelConfig.from_huggingface(V2).gate
    assert (gate.scoring, gate.method, gate.has_bias, gate.normalised, gate.scaling) == (
        "softmax",
        "group_limited_greedy",
        False,
        False,
        16.0,
    )
    lite = ModelConfig.from_huggingface(V2_LITE)
    assert (lite.gate.method, lite.gate.groups_count, lite.q_lora_rank) == ("greedy", 1, None)


def test_kimi_k2_is_of_the_v3_family_and_moonlight_has_no_yarn():
    assert ModelConfig.from_huggingface(KIMI_K2).family == "deepseek_v3"
    moonlight = ModelConfig.from_huggingface(MOONLIGHT)
    assert (moonlight.rope.theta, moonlight.rope.yarn, moonlight.rms_norm_eps) == (50000.0, None, 1e-5)
    assert moonlight.weight_format == WeightFormat("bfloat16")
    # The norms over latents do not follow rms_norm_eps.
    assert moonlight.latent_norm_eps == 1e-6


def test_both_spellings_of_transformers_mean_the_same():
    dropped = ("rope_scaling", "rope_theta", "torch_dtype", "topk_method", "scoring_func", "moe_layer_freq")
    new = {name: value for name, value in V3.items() if name not in dropped}
    rope = {name: value for name, value in YARN.items() if name != "type"}
    new["rope_parameters"] = rope | {"rope_type": "yarn", "rope_theta": 10000}
    new["dtype"] = "bfloat16"
    assert ModelConfig.from_huggingface(new) == ModelConfig.from_huggingface(V3)


def test_a_model_without_experts_has_no_gate_and_only_dense_layers():
    for change in ({"n_routed_experts": None}, {"first_k_dense_replace": 61}):
        config = ModelConfig.from_huggingface(V3 | change)
        assert (config.gate, config.dense_layers_count, len(config.moe_layers)) == (None, 61, 0)


REFUSED = {
    "architectures": (["LlamaForCausalLM"], ["DeepseekV2ForCausalLM"], None, "DeepseekV3ForCausalLM"),
    "model_type": ("llama", "deepseek_v32", "deepseek_v4", None, 3, ["deepseek_v3"]),
    "index_topk": (2048,),
    "index_n_heads": (64,),
    "vocab_size": (None, 0, -1, True, 2.0, "129280", 2**31),
    "hidden_size": (0,),
    "num_hidden_layers": (0, 2000, None),
    "num_attention_heads": (0, 1.5),
    "num_key_value_heads": (8,),
    "q_lora_rank": (0, "1536"),
    "kv_lora_rank": (None, 0),
    "qk_rope_head_dim": (63, 1, 0),
    "max_position_embeddings": (0,),
    "n_routed_experts": (-1, 100, 100_000),
    "num_experts_per_tok": (0, 257, 129, None),
    "n_group": (0, 7, 256, None),
    "topk_group": (0, 9, None),
    "topk_method": ("greedy", "group_limited_greedy", "softmax"),
    "scoring_func": ("softmax", 1),
    "routed_scaling_factor": (0, -2.5, float("nan"), float("inf"), "2.5", 10**400),
    "norm_topk_prob": (1, "true"),
    "moe_layer_freq": (2,),
    "first_k_dense_replace": (-1,),
    "n_shared_experts": (-1, 1.0),
    "hidden_act": ("gelu",),
    "mlp_bias": (True,),
    "rms_norm_eps": (0, float("nan")),
    "rope_theta": (0, "10000"),
    "rope_parameters": ({"rope_type": "yarn"},),
    "partial_rotary_factor": (0.5,),
    "torch_dtype": ("float8", 16),
    "eos_token_id": (-1, 129280, "1", [1, True]),
    "bos_token_id": (129280,),
    "compression_config": ({"format": "int4"},),
    "tie_word_embeddings": (0,),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_a_bad_value_is_refused_by_name(field, value):
    # An expert count can only be judged through the groups that must divide it.
    named = "n_group" if (field, value) == ("n_routed_experts", 100) else field
    named = "rope_scaling" if field == "rope_parameters" else named
    with pytest.raises(ModelConfigError, match=named) as caught:
        ModelConfig.from_huggingface(V3 | {field: value})
    assert caught.value.field == named


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rope_scaling.type", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("rope_scaling.factor", {"rope_scaling": YARN | {"factor": 0.5}}),
        ("rope_scaling.factor", {"rope_scaling": YARN | {"factor": None}}),
        ("rope_scaling.original_max_position_embeddings", {"rope_scaling": {"type": "yarn", "factor": 4}}),
        ("rope_scaling", {"rope_scaling": 40}),
        ("quantization_config.quant_method", {"quantization_config": {"quant_method": "compressed-tensors"}}),
        ("quantization_config.quant_method", {"quantization_config": {}}),
        ("quantization_config.fmt", {"quantization_config": FP8 | {"fmt": "e5m2"}}),
        (
            "quantization_config.activation_scheme",
            {"quantization_config": FP8 | {"activation_scheme": "static"}},
        ),
        ("quantization_config.weight_block_size", {"quantization_config": FP8 | {"weight_block_size": None}}),
        (
            "quantization_config.weight_block_size",
            {"quantization_config": FP8 | {"weight_block_size": [128, 0]}},
        ),
    ],
)
def test_a_bad_nested_value_is_refused_by_its_path(field, change):
    with pytest.raises(ModelConfigError) as caught:
        ModelConfig.from_huggingface(V3 | change)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["norm_topk_prob", "rope_interleave"])
def test_v2_refuses_what_implementations_disagree_on(field):
    with pytest.raises(ModelConfigError, match=field):
        ModelConfig.from_huggingface(V2 | {field: field == "norm_topk_prob"})


def test_v3_2_is_refused_for_its_sparse_attention():
    with pytest.raises(ModelConfigError, match=r"sparse attention.*use a V2"):
        ModelConfig.from_huggingface(V3_2)


REQUIRED = ("vocab_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "n_routed_experts")


@pytest.mark.parametrize("field", [*REQUIRED, "num_experts_per_tok", "n_group", "first_k_dense_replace"])
def test_a_missing_size_is_refused(field):
    with pytest.raises(ModelConfigError, match="missing") as caught:
        ModelConfig.from_huggingface({name: value for name, value in V3.items() if name != field})
    assert caught.value.field == field


def test_from_folder_adds_the_ends_of_text_of_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KIMI_K2))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (163585,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [163586, 163585]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (163585, 163586)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 999999}')
    with pytest.raises(ModelConfigError, match=r"generation_config\.json\.eos_token_id"):
        ModelConfig.from_folder(tmp_path)


BROKEN_FILES = [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"vocab_size": ' + b"1" * 5000 + b"}"]


@pytest.mark.parametrize("text", BROKEN_FILES, ids=range(len(BROKEN_FILES)))
def test_a_broken_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelConfigError, match=r"config\.json.*cannot be read"):
        ModelConfig.from_folder(tmp_path)
