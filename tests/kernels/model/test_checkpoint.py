"""Checkpoints load exactly and in parts; damaged, foreign and hostile ones are refused before mapping."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.model.checkpoint import Checkpoint
from kernels.model.config import ModelConfig
from kernels.model.safetensors_header import CheckpointError
from kernels.model.tensor_names import attention_half_names, expected_shapes, expert_names
from kernels.ops.quantize import dequantize_blocks
from tests.checkpoints import NAMES, build, random_prompt, reference_logits, reference_tokens, twin_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: build(name, root / name) for name in NAMES}


@pytest.fixture
def folder(built, tmp_path) -> Path:
    """A copy of one checkpoint in three files, to be damaged."""
    return Path(shutil.copytree(built["groups"], tmp_path / "checkpoint"))


@pytest.fixture
def fp8_folder(built, tmp_path) -> Path:
    return Path(shutil.copytree(built["fp8"], tmp_path / "fp8"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def save_single(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the files of a checkpoint by one without an index."""
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")


def write_file(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_index(folder: Path, change) -> None:
    document = json.loads((folder / INDEX).read_text())
    change(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fp8"])
def test_every_tensor_loads_as_it_is_stored(built, name):
    checkpoint = Checkpoint(built[name])
    loaded = checkpoint.load(list(expected_shapes(checkpoint.config)), torch.float32)
    expected = stored(built[name])
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert checkpoint.notices == []


def test_halves_and_experts_cover_the_model_once(built):
    config = Checkpoint(built["no_dense"]).config
    experts = [
        name
        for layer in config.moe_layers
        for expert in range(config.routed_experts_count)
        for name in expert_names(config, layer, expert)
    ]
    assert sorted([*attention_half_names(config), *experts]) == sorted(expected_shapes(config))
    assert not any(".experts." in name for name in attention_half_names(config))


def test_names_follow_hugging_face(built):
    config = Checkpoint(built["groups"]).config
    assert expert_names(config, 2, 7) == tuple(
        f"model.layers.2.mlp.experts.7.{part}_proj.weight" for part in ("gate", "up", "down")
    )
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in attention_half_names(config)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" not in expected_shapes(
        Checkpoint(built["v2_gate"]).config
    )
    assert "lm_head.weight" not in attention_half_names(Checkpoint(built["tied_head"]).config)
    for layer, expert in ((0, 0), (3, 0), (1, 16), (1, -1)):
        with pytest.raises(ValueError, match="experts are in layers 1 to 2, numbered 0 to 15"):
            expert_names(config, layer, expert)


def test_attention_biases_are_expected_where_the_config_has_them(built):
    document = json.loads((built["groups"] / "config.json").read_text()) | {"attention_bias": True}
    biases = [n for n in attention_half_names(ModelConfig.from_huggingface(document)) if n.endswith(".bias")]
    assert len(biases) == 3 * 3
    assert "model.layers.0.self_attn.q_b_proj.bias" not in biases


def test_fp8_blocks_are_dequantised_with_ragged_edges(built):
    checkpoint = Checkpoint(built["fp8"])
    names = list(expected_shapes(checkpoint.config))
    raw, twin = stored(built["fp8"]), stored(twin_folder(built["fp8"]))
    loaded = checkpoint.load(names, torch.float32)
    assert all(torch.equal(loaded[name], twin[name]) for name in names)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert raw[name].shape == (576, 128)
    assert raw[f"{name}_scale_inv"].shape == (5, 1)
    half = checkpoint.load([name], torch.bfloat16)[name]
    assert torch.equal(half, dequantize_blocks(raw[name], raw[f"{name}_scale_inv"], dtype=torch.bfloat16))


def test_only_the_gate_bias_stays_float32(built):
    checkpoint = Checkpoint(built["groups"])
    loaded = checkpoint.load(attention_half_names(checkpoint.config), torch.bfloat16)
    kept = {name for name, tensor in loaded.items() if tensor.dtype == torch.float32}
    assert kept == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in loaded.items() if name not in kept)


def test_only_what_is_asked_for_is_read_and_progress_reaches_its_end(built):
    checkpoint = Checkpoint(built["fp8"])
    names = list(expert_names(checkpoint.config, 1, 3))
    seen = []
    loaded = checkpoint.load(names, torch.float32, lambda done, total: seen.append((done, total)))
    assert list(loaded) == names
    # 128 x 128 FP8 numbers and one float32 scale for each of the three.
    each = 128 * 128 + 4
    assert seen == [(each, 3 * each), (2 * each, 3 * each), (3 * each, 3 * each)]


def test_loaded_weights_do_not_change_with_the_file(folder):
    checkpoint = Checkpoint(folder)
    name = "model.norm.weight"
    before = stored(folder)[name].clone()
    loaded = checkpoint.load([name], torch.float32)[name]
    path = checkpoint._stored[name].path
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded, before)


def test_a_name_outside_the_model_is_refused(built):
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.norm: is no weight"):
        Checkpoint(built["groups"]).load(["model.layers.9.norm"], torch.float32)


def test_next_token_layers_are_passed_over_with_one_notice(folder):
    extra = {
        f"model.layers.{layer}.{part}.weight": torch.ones(2) for layer in (3, 4) for part in ("enorm", "eh")
    }
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    save_single(folder, stored(folder) | extra)
    assert Checkpoint(folder).notices == ["Layers [3, 4] predict tokens further ahead and are passed over."]


def test_a_tied_head_in_the_file_is_passed_over_with_a_notice(built, tmp_path):
    folder = Path(shutil.copytree(built["tied_head"], tmp_path / "tied"))
    save_single(folder, stored(folder) | {"lm_head.weight": torch.ones(512, 128)})
    assert [notice[:14] for notice in Checkpoint(folder).notices] == ["lm_head.weight"]


def test_links_to_blobs_elsewhere_are_followed(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        shutil.move(path, blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert Checkpoint(folder).config.layers_count == 3


# What must be refused.


@pytest.mark.parametrize("bytes_kept", [0, 7, 8, 100, -1, -100_000])
def test_a_truncated_file_is_refused(folder, bytes_kept):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:bytes_kept])
    with pytest.raises(CheckpointError, match=f"{path.name}.*(truncated|not fit)"):
        Checkpoint(folder)


def test_bytes_after_the_end_are_refused(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="belong to no tensor"):
        Checkpoint(folder)


def test_a_file_cut_after_it_was_checked_is_refused_rather_than_mapped(folder):
    checkpoint = Checkpoint(folder)
    path = checkpoint._stored["model.norm.weight"].path
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{path.name}"):
        checkpoint.load(["model.norm.weight"], torch.float32)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GARBLED = {
    "a header of 2^63 bytes": b"\xff" * 8 + b"{}",
    "no JSON": b"{]",
    "a list": [],
    "a name twice": b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2),
    "deep nesting": b"[" * 200_000,
    "an entry that is a number": {"a": 1},
    "an unknown dtype": {"a": F32 | {"dtype": "F7"}},
    "a dtype that is a list": {"a": F32 | {"dtype": []}},
    "a negative size": {"a": F32 | {"shape": [-1]}},
    "a size of 2^70": {"a": F32 | {"shape": [2**70]}},
    "nine dimensions": {"a": F32 | {"shape": [1] * 9}},
    "sizes that are true": {"a": F32 | {"shape": [True]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "three offsets": {"a": F32 | {"data_offsets": [0, 4, 8]}},
    "an end before the start": {"a": F32 | {"data_offsets": [4, 0]}},
    "fewer bytes than the shape": {"a": F32 | {"shape": [2]}},
    "data beyond the file": {"a": F32 | {"shape": [2], "data_offsets": [0, 8]}},
    "overlapping ranges": {"a": F32, "b": F32},
    "partly overlapping ranges": {"a": F32, "b": F32 | {"data_offsets": [2, 6]}},
    "a gap": {"a": F32 | {"data_offsets": [4, 8]}},
}


@pytest.mark.parametrize("what", GARBLED)
def test_a_garbled_header_is_refused(folder, what):
    save_single(folder, {})
    path, garbled = folder / "model.safetensors", GARBLED[what]
    if isinstance(garbled, bytes) and garbled[:1] == b"\xff":
        path.write_bytes(garbled)
    else:
        write_file(path, garbled, bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(folder)


def test_a_missing_tensor_is_refused_by_name(folder):
    tensors = stored(folder)
    del tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_single(folder, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.7\.up_proj\.weight: is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.0.down_proj.weight"])
def test_a_wrong_shape_is_refused_by_name(folder, name):
    tensors = stored(folder)
    tensors[name] = tensors[name][..., :-1].contiguous()
    save_single(folder, tensors)
    with pytest.raises(CheckpointError, match=f"{name}: shape .* but config.json asks for"):
        Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_unsupported_dtype_is_refused(folder, dtype):
    tensors = stored(folder)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_single(folder, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: dtype .*; supported: F32"):
        Checkpoint(folder)


def test_a_tensor_that_the_model_has_no_use_for_is_refused(folder):
    save_single(folder, stored(folder) | {"model.layers.0.self_attn.q_b_proj.bias": torch.ones(384)})
    with pytest.raises(CheckpointError, match=r"q_b_proj\.bias: config\.json has no use for it"):
        Checkpoint(folder)


SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SCALE), "is missing for an FP8 weight"),
        (lambda tensors: tensors.update({SCALE: torch.ones(3, 1)}), "shape"),
        (lambda tensors: tensors.update({SCALE: torch.ones(2, 1, dtype=torch.int32)}), "dtype I32"),
        (lambda tensors: tensors.update({SCALE[:-10]: torch.ones(256, 128)}), "is there for a weight in F32"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(128).to(torch.float8_e4m3fn)}),
            "dtype",
        ),
    ],
    ids=["no scale", "scale shape", "scale dtype", "scale of a float weight", "FP8 norm"],
)
def test_scales_and_weights_that_do_not_pair_are_refused(fp8_folder, change, message):
    tensors = stored(fp8_folder)
    change(tensors)
    save_single(fp8_folder, tensors)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(fp8_folder)


def test_one_tensor_in_two_files_is_refused(folder):
    first, second, _ = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file(tensors | {name: tensor}, second)
    with pytest.raises(CheckpointError, match=f"{name}: is in both {first.name} and {second.name}"):
        Checkpoint(folder)


OUTSIDE = ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors"]


@pytest.mark.parametrize(
    "file_name", [*OUTSIDE, "x\0.safetensors", "weights.bin", 3, None, ["a.safetensors"]]
)
def test_an_index_that_leaves_the_folder_is_refused(folder, tmp_path, file_name):
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "model.safetensors")
    change_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": file_name}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: file name .* is not that of"):
        Checkpoint(folder)


def test_an_index_that_names_the_wrong_file_is_refused(folder):
    other = sorted(folder.glob("*.safetensors"))[1].name
    change_index(folder, lambda weight_map: weight_map.update({"model.embed_tokens.weight": other}))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: is not in"):
        Checkpoint(folder)


def test_a_file_that_is_not_there_is_refused(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name}: no such file"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff"]
)
def test_an_unreadable_index_is_refused(folder, text):
    (folder / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(folder)


def test_a_folder_without_weights_is_refused(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        Checkpoint(folder)


# The references that parity tests lean on.


@pytest.mark.parametrize("name", NAMES)
def test_reference_tokens_are_varied_and_agree_with_its_logits(built, name):
    prompt = random_prompt(name, 65)
    tokens = reference_tokens(built[name], prompt, 64)
    assert len(set(tokens)) >= 20
    logits = reference_logits(built[name], prompt + tokens[:-1])
    assert logits[64:].argmax(dim=-1).tolist() == tokens
