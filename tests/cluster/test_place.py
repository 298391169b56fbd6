"""What every actor is told: secrets out of files or new ones, and where members listen."""

from pathlib import Path

import pytest

from cluster import place as place_module
from cluster.config import check_config
from cluster.errors import InvalidConfig
from cluster.place import Place, make_place

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
