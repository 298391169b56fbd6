"""What every actor is told: secrets out of files or new ones, and where members listen."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster import place as place_module
from cluster.config import check_config
from cluster.errors import InvalidConfig
from cluster.place import (
    Place,
    context_tokens_max,
    kept_expert_bytes,
    latent_bytes,
    make_place,
)
from kernels.model.checkpoint import Checkpoint
from kernels.model.config import ModelConfig, WeightFormat

FOLDER = Path("examples/trivium-small")


def made(tmp_path: Path, **sections: dict) -> Place:
    """The place of a cluster with some settings."""
    values = {"model": {"folder": str(FOLDER.resolve())}, **sections}
    return make_place(check_config(values, "test", tmp_path), "/a/folder")


def test_secrets_are_in_the_files(tmp_path):
    (tmp_path / "secret").write_text("of channels\n")
    (tmp_path / "token").write_text("of operators\n")
    place = made(tmp_path, transport={"secret_file": "secret"}, operations={"token_file": "token"})
    assert (place.secret, place.operations_token) == ("of channels", "of operators")


def test_without_files_they_are_new_each_time_and_long(tmp_path):
    first, second = made(tmp_path), made(tmp_path)
    secrets = {first.secret, second.secret, first.operations_token, second.operations_token}
    assert len(secrets) == 4 and min(map(len, secrets)) >= 32


def test_secrets_are_not_shown(tmp_path):
    place = made(tmp_path)
    assert place.secret not in repr(place) and place.operations_token not in repr(place)


@pytest.mark.parametrize("key", ["transport.secret_file", "operations.token_file"])
@pytest.mark.parametrize("content", [None, "", " \n", "two\nlines", "no\x00text", "gr\u00fcn"])
def test_a_file_that_holds_no_secret_is_refused_by_its_key(tmp_path, key: str, content: str | None):
    if content is not None:
        (tmp_path / "file").write_text(content)
    section, name = key.split(".")
    with pytest.raises(InvalidConfig) as caught:
        made(tmp_path, **{section: {name: "file"}})
    assert caught.value.field == key and caught.value.remedy


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(place_module, "own_host", lambda: "10.1.2.3")
    assert made(tmp_path).address("prefill-1") == "unix:///a/folder/prefill-1.sock"
    assert made(tmp_path, transport={"scheme": "tcp"}).address("x") == "tcp://127.0.0.1:0"
    there = made(tmp_path, transport={"scheme": "tcp", "host": "10.9.9.9"})
    assert there.address("x") == "tcp://10.9.9.9:0"
    anywhere = made(tmp_path, transport={"scheme": "tcp", "host": "auto"})
    assert anywhere.address("x") == "tcp://10.1.2.3:0"


def test_latents_in_fp8_make_room_for_longer_contexts(tmp_path):
    model = Checkpoint(FOLDER).config
    sizes = {"prefill": {"latents_bytes": 2**20}, "decode": {"latents_bytes": 2**20}}
    plain = made(tmp_path, **sizes).config
    packed = made(tmp_path, model={"folder": str(FOLDER.resolve()), "latents": "fp8"}, **sizes).config
    assert latent_bytes(model, packed) == model.kv_lora_rank + 4 * (model.kv_lora_rank // 128) + 2 * 64
    assert context_tokens_max(model, packed) > context_tokens_max(model, plain)


def test_experts_take_the_room_that_shards_keep_them_in(tmp_path):
    model = ModelConfig.from_folder(FOLDER)
    fp8 = replace(model, moe_intermediate_size=256, weight_format=WeightFormat("bfloat16", "fp8", (128, 128)))
    numbers_count, blocks_count = 3 * 256 * fp8.hidden_size, 3 * 2 * -(-fp8.hidden_size // 128)

    def bytes_with(experts: dict, **section: str) -> int:
        sections = {"compute_dtype": "bfloat16", **section, "folder": str(FOLDER.resolve())}
        return kept_expert_bytes(fp8, made(tmp_path, model=sections, experts=experts).config)

    gpus = {"resources": {"GPU": 1}}
    assert bytes_with({}) == bytes_with(gpus, device="cpu") == 2 * numbers_count
    assert bytes_with(gpus) == bytes_with({}, device="cuda") == numbers_count + 4 * blocks_count


@pytest.mark.parametrize(
    ("tensors", "address"),
    [
        ("host", ""),
        ("nccl", "nccl://127.0.0.1:0"),
        ("cuda-ipc", "cuda-ipc:///a/folder/decode-1-tensors.sock"),
    ],
)
def test_tensors_from_other_gpus_have_an_address_of_their_own(tmp_path, tensors, address):
    place = made(tmp_path, transport={"tensors": tensors})
    assert place.tensors_address("decode-1") == address
    assert place.address("decode-1") == "unix:///a/folder/decode-1.sock"
