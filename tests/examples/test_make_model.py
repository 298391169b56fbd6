"""The bundled checkpoint is what its script makes."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from cluster.tokenizer import Tokenizer
from examples.make_model import FOLDER, SEED, SPECIAL_TOKENS, make_model

FILES_BYTES_MAX = 5 * 2**20


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    make_model(folder, SEED)
    return folder


def test_the_committed_files_are_those_of_a_fresh_run(fresh):
    committed = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    made = {path.name: path.read_bytes() for path in fresh.iterdir()}
    assert sorted(committed) == sorted(made)
    assert [name for name in made if made[name] != committed[name]] == []
    assert sum(map(len, made.values())) < FILES_BYTES_MAX


def test_another_seed_makes_other_weights_and_the_same_rest(fresh, tmp_path):
    make_model(tmp_path, SEED + 1)
    differing = {
        path.name for path in fresh.iterdir() if path.read_bytes() != (tmp_path / path.name).read_bytes()
    }
    assert differing == {path.name for path in fresh.glob("*.safetensors")}


def test_the_index_tells_where_each_tensor_is(fresh):
    index = json.loads((fresh / "model.safetensors.index.json").read_text())
    found = {}
    for path in fresh.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    assert found == index["weight_map"]
    assert len(set(found.values())) == 2
    experts = {
        int(match[1]) for name in found if (match := re.search(r"layers\.1\.mlp\.experts\.(\d+)\.", name))
    }
    assert experts == set(range(16))


def test_the_tokenizer_covers_the_vocabulary_and_any_text(fresh):
    tokenizer = Tokenizer.from_folder(fresh)
    special_ids = [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS]
    assert special_ids == [[0], [1], [2], [3]]
    assert tokenizer.encode("x")[0] == 0
    assert tokenizer.has_text(1023) and not tokenizer.has_text(1024)
    assert tokenizer.decode(tokenizer.encode("naïve 你好 🌱\x00")) == "naïve 你好 🌱\x00"
