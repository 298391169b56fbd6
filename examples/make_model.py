"""Makes the small DeepSeek-V3 checkpoint and its tokenizer that stand in examples/trivium-small.

The weights are drawn, not trained: it writes nonsense, but each part of the architecture is there. Each
number is made of bytes from Python's seeded generator, exactly, so every machine makes the same files.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).parent / "trivium-small"
LICENSE = Path(__file__).parents[1] / "LICENSE"
SEED = 2026

BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT]  # Their ids are 0 to 3.
VOCAB_SIZE = 1024

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": VOCAB_SIZE,
}

STORY = """
A request walks down the stairs, and its tokens come back up. The gateway greets it, counts its words and
asks the router where to go. In prefill the whole prompt is read at once; what each layer remembers of it
leaves for decode while the next layer is still thinking. There the answer grows, one token at a time.
Whoever needs an expert sends for one: sixteen sit in each layer, four are asked, and their answers are
mixed by weight. No token waits longer than it must, no page is lost, and nobody climbs where a step goes
down.

Why three? Because a crossroads where three roads meet was called a trivium: grammar to read the question,
logic to find the answer, rhetoric to say it well. Prefill reads, the experts find, decode says. Ask it
anything: it was never taught to answer, and so it answers in tongues. Grüße, señor, 你好, привет, こんにちは,
🌱🌿🌳!

def walk_down(stairs):
    for step in stairs:
        yield step.answer(question="Which way?", tokens=[1, 2, 3], temperature=0.7)
"""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {{- message.content + '\\n\\n' }}
    {%- elif message.role == 'user' %}
        {{- '<|user|>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('roles are user and assistant, and system for the first message only; not '
            + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def make_tokenizer() -> Tokenizer:
    """Train a byte-level BPE of 1,024 tokens on the licence and the story."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LICENSE.read_text(encoding="utf-8"), STORY], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Name every tensor as Hugging Face does, with its shape; linear weights are `[output, input]`."""
    hidden, vocab = CONFIG["hidden_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(layer).items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Name the tensors of one layer: attention, norms, and a dense MLP or a mixture of experts."""
    hidden = CONFIG["hidden_size"]
    shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes |= attention_shapes()
    if layer < CONFIG["first_k_dense_replace"]:
        return shapes | mlp_shapes("mlp", CONFIG["intermediate_size"])
    experts_count = CONFIG["n_routed_experts"]
    shapes["mlp.gate.weight"] = (experts_count, hidden)
    shapes["mlp.gate.e_score_correction_bias"] = (experts_count,)
    for expert in range(experts_count):
        shapes |= mlp_shapes(f"mlp.experts.{expert}", CONFIG["moe_intermediate_size"])
    return shapes | mlp_shapes(
        "mlp.shared_experts", CONFIG["n_shared_experts"] * CONFIG["moe_intermediate_size"]
    )


def attention_shapes() -> dict[str, tuple[int, ...]]:
    """Name the tensors of latent attention: queries and latents each go down and up again."""
    hidden, heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    nope, rope, value = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"], CONFIG["v_head_dim"]
    q_lora_rank, kv_lora_rank = CONFIG["q_lora_rank"], CONFIG["kv_lora_rank"]
    return {
        "self_attn.q_a_proj.weight": (q_lora_rank, hidden),
        "self_attn.q_a_layernorm.weight": (q_lora_rank,),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), q_lora_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (kv_lora_rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (kv_lora_rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), kv_lora_rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }


def mlp_shapes(prefix: str, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Name the three tensors of one gated MLP."""
    hidden = CONFIG["hidden_size"]
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }


def make_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw a tensor of its own from the seed and its name: even steps, no rounding that could differ."""
    count = torch.Size(shape).numel()
    drawn = torch.frombuffer(bytearray(random.Random(f"{seed} {name}").randbytes(count)), dtype=torch.uint8)
    even = (drawn.to(torch.float32) - 127.5).reshape(shape) / 128  # Within (-1, 1), deviation 0.58.
    if name.endswith("e_score_correction_bias"):
        return even / 16  # float32, as real checkpoints keep it.
    if name.endswith("norm.weight"):
        return (1 + even / 4).to(torch.bfloat16)
    return (even * weight_scale(name, shape)).to(torch.bfloat16)


def weight_scale(name: str, shape: tuple[int, ...]) -> float:
    """Choose a power of two so that a layer's output is about as large as its input."""
    if name == "model.embed_tokens.weight":
        return 1.0
    scale = 1.0
    while scale * scale * shape[-1] > 3:
        scale /= 2
    return scale * (2 if name == "lm_head.weight" else 1)


def write_weights(folder: Path, seed: int) -> None:
    """Write two shards of safetensors, the last layer and the head in the second, and their index."""
    last_layer = f"model.layers.{CONFIG['num_hidden_layers'] - 1}."
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, shape in tensor_shapes().items():
        in_second = name.startswith((last_layer, "model.norm.", "lm_head."))
        shards[in_second][name] = make_tensor(name, shape, seed)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and what goes with it: special tokens and the chat template."""
    (folder / "tokenizer.json").write_text(make_tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with sorted keys, so that the same content is always the same bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_model(folder: Path, seed: int) -> None:
    """Write the whole checkpoint into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    write_json(folder / "generation_config.json", generation)
    write_weights(folder, seed)
    write_tokenizer(folder)


def main(
    out: Annotated[Path, typer.Option(help="folder to write")] = FOLDER,
    seed: Annotated[int, typer.Option(help="another seed makes other weights")] = SEED,
) -> None:
    """Make the small checkpoint that the examples and the tests serve."""
    make_model(out, seed)
    files = sorted(path for path in out.iterdir() if path.is_file())
    total_bytes = sum(path.stat().st_size for path in files)
    typer.echo(f"{out}: {len(files)} files, {total_bytes / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
