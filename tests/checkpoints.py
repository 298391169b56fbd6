"""Tiny checkpoints of every shape the family has, and the tokens and logits that transformers gets from them.

Each is seeded by its name. V3 checkpoints get the config.json spelling that published ones have, V2 ones keep
the spelling of transformers 5.
"""

import functools
import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

from kernels.ops.quantize import dequantize_blocks, quantize_blocks

COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V2_GATE = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 4.0,
}
V2_GREEDY = {
    "topk_method": "greedy",
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 2,
}
RECIPES = {
    "groups": {"n_group": 4, "topk_group": 2},
    "no_q_lora": {"q_lora_rank": None, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446},
    "v2_gate": V2_GATE,
    "v2_greedy": V2_GREEDY,
    "yarn": {"rope_parameters": YARN, "n_group": 4, "topk_group": 2},
    "two_shared": {"n_shared_experts": 2},
    "no_dense": {"first_k_dense_replace": 0},
    "fp8": {"n_group": 4, "topk_group": 2, "moe_intermediate_size": 128},  # whole blocks, which stay FP8
    "tied_head": {"tie_word_embeddings": True},
}
NAMES = tuple(RECIPES)
BLOCK = (128, 128)
QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
PROJECTIONS = ("_proj.weight", "_proj_with_mqa.weight")


def build(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` (one of NAMES) into `folder`, made if need be, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    family = "deepseek_v2" if name.startswith("v2_") else "deepseek_v3"
    model = _random_model(family, COMMON | RECIPES[name], zlib.crc32(name.encode()))
    # Three files with an index, except for one checkpoint that is a single file.
    model.save_pretrained(folder, max_shard_size="50MB" if name == "tied_head" else "3MB")
    _rewrite_config(folder, _as_published if family == "deepseek_v3" else _with_scoring)
    if name == "fp8":
        _quantise(folder)
        build_dequantised_twin(folder)
    return folder


def build_dequantised_twin(folder: Path) -> Path:
    """Write beside an FP8 checkpoint the same one in float32, for transformers, and return its folder."""
    twin = twin_folder(folder)
    twin.mkdir(exist_ok=True)
    for path in folder.glob("*.json"):
        shutil.copy(path, twin)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    for name, tensor in tensors.items():
        scale = scales.get(f"{name}_scale_inv")
        tensors[name] = tensor.float() if scale is None else dequantize_blocks(tensor, scale, BLOCK)
    (twin / "model.safetensors.index.json").unlink()
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    plain = {"quantization_config": None, "torch_dtype": "float32"}
    _rewrite_config(twin, lambda document: document | plain)
    return twin


def twin_folder(folder: Path) -> Path:
    """Where the float32 twin of an FP8 checkpoint lies."""
    return folder.with_name(folder.name + "_dequantised")


def reference_tokens(folder: Path, prompt_ids: list[int], tokens_count: int) -> list[int]:
    """The next `tokens_count` greedy tokens by transformers in float32, ends of text not heeded."""
    model = _reference_model(_reference_folder(folder))
    tokens: list[int] = []
    inputs, cache = torch.tensor([prompt_ids]), None
    with torch.inference_mode():
        while len(tokens) < tokens_count:
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            tokens.append(int(output.logits[0, -1].argmax()))
            inputs = torch.tensor([[tokens[-1]]])
    return tokens


def reference_logits(folder: Path, prompt_ids: list[int]) -> torch.Tensor:
    """Logits `[tokens, vocab]` after each token of the prompt, by transformers in float32."""
    with torch.inference_mode():
        return _reference_model(_reference_folder(folder))(torch.tensor([prompt_ids])).logits[0]


def random_prompt(name: str, tokens_count: int) -> list[int]:
    """Token ids of a prompt for the checkpoint `name`, the same on every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {tokens_count}".encode()))
    return torch.randint(2, COMMON["vocab_size"], (tokens_count,), generator=generator).tolist()


def _reference_folder(folder: Path) -> Path:
    return twin_folder(folder) if twin_folder(folder).exists() else folder


@functools.lru_cache(maxsize=1)
def _reference_model(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def _random_model(family: str, values: dict, seed: int) -> PreTrainedModel:
    v2 = family == "deepseek_v2"
    config = DeepseekV2Config(**values) if v2 else DeepseekV3Config(**values)
    model = DeepseekV2ForCausalLM(config) if v2 else DeepseekV3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in name:
                tensor.copy_(_random_weight(name, tensor.shape, generator, model.config.tie_word_embeddings))
    return model


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator, tied: bool) -> torch.Tensor:
    """So strong that greedy tokens do not settle into one; norms near 1, gate biases from -0.1 to 0.1."""
    normal = torch.randn(shape, generator=generator)
    if "e_score_correction_bias" in name:
        return torch.rand(shape, generator=generator) * 0.2 - 0.1
    if "norm" in name:
        return 1 + 0.1 * normal
    # An embedding this strong would make a tied head repeat the last token for ever.
    return normal * (0.5 if "embed_tokens" in name and not tied else 0.1)


def _rewrite_config(folder: Path, change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2))


def _with_scoring(document: dict) -> dict:
    return document | {"scoring_func": "softmax", "moe_layer_freq": 1}


def _as_published(document: dict) -> dict:
    rope = document.pop("rope_parameters")
    document["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    document["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    document["torch_dtype"] = document.pop("dtype")
    return document | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}


def _quantise(folder: Path) -> None:
    """Projections in FP8 blocks, the rest but the gate's bias in bfloat16, as DeepSeek publishes them."""
    index = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(path).items():
            if name.endswith(PROJECTIONS):
                tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensor, BLOCK)
            else:
                tensors[name] = tensor if "e_score" in name else tensor.bfloat16()
        save_file(tensors, path, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
    document = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    quantised = {"torch_dtype": "bfloat16", "quantization_config": QUANTISATION}
    _rewrite_config(folder, lambda document: document | quantised)
