"""A configuration is right, or says file, key, limit and remedy."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import ClusterConfig, check_config, load_config, parse_bytes
from cluster.errors import InvalidConfig

LOCAL = Path(__file__).parents[2] / "examples" / "local.yaml"


def load(folder: Path, text: str) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return load_config(path)


def refused(folder: Path, text: str) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load(folder, text)
    error = caught.value
    assert str(folder / "cluster.yaml") in error.field
    assert error.limit and error.remedy
    return error


def test_the_example_serves_the_bundled_model():
    config = load_config(LOCAL)
    assert (config.model.folder / "config.json").is_file()
    assert config.model.served_name == "trivium-small"
    assert (config.prefill.count, config.decode.count, config.experts.shards_count) == (1, 1, 2)
    assert config.prefill.latents_bytes == 64 * 2**20


def test_a_folder_is_enough(tmp_path):
    config = load(tmp_path, "model: {folder: weights}")
    assert config.model.folder == tmp_path / "weights"
    assert (config.gateway.port, config.prefill.step_tokens_max, config.decode.requests_max) == (
        50051,
        512,
        64,
    )
    assert (config.threads_per_actor, config.decode.micro_batches) == (1, None)
    with pytest.raises(ValidationError):
        config.gateway.port = 1


def sections(section: type[BaseModel]):
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


def test_every_key_says_what_it_means():
    fields = [
        (name, field) for section in sections(ClusterConfig) for name, field in section.model_fields.items()
    ]
    assert len(fields) > 30
    assert [name for name, field in fields if not field.description] == []
    assert [name for name, field in fields if field.is_required()] == ["model", "folder"]


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("gatewy: {}", "gatewy", "gateway"),
        ("gateway: {prot: 1}", "gateway.prot", "port"),
        ("decode: {request_max: 1}", "decode.request_max", "requests_max"),
    ],
)
def test_an_unknown_key_is_told_with_what_was_meant(tmp_path, text, key, meant):
    error = refused(tmp_path, "model: {folder: x}\n" + text)
    assert error.reason == "UNKNOWN_KEY"
    assert error.field.endswith(f": {key}")
    assert meant in error.limit and error.remedy == f"Did you mean {meant}?"


def test_an_unknown_key_unlike_any_other(tmp_path):
    assert refused(tmp_path, "model: {folder: x}\nzzz: 1").remedy == "Take it out."


def test_an_unknown_key_is_told_before_the_one_it_should_have_been(tmp_path):
    assert refused(tmp_path, "modle: {folder: x}").remedy == "Did you mean model?"


@pytest.mark.parametrize(
    ("text", "key", "limit"),
    [
        ("gateway: {port: 70000}", "gateway.port", "65535"),
        ("gateway: {port: '1'}", "gateway.port", "integer"),
        ("gateway: {port: true}", "gateway.port", "integer"),
        ("gateway: {stall_timeout_s: .nan}", "gateway.stall_timeout_s", "finite"),
        ("gateway: {message_bytes_max: 2}", "gateway.message_bytes_max", "1024"),
        ("gateway: {host: 'a b'}", "gateway.host", "pattern"),
        ("prefill: {count: -1}", "prefill.count", "0"),
        ("prefill: {count: 0}", "the file", "reads_prompts"),
        ("decode: {reads_prompts: true}\ntransport: {tensors: nccl}", "the file", "host"),
        ("prefill: {latents_bytes: 12 cows}", "prefill.latents_bytes", "256MiB"),
        ("decode: {latents_bytes: 1KiB}", "decode.latents_bytes", "1048576"),
        ("decode: {micro_batches: 3}", "decode.micro_batches", "1 or 2"),
        ("transport: {scheme: udp}", "transport.scheme", "'unix' or 'tcp'"),
        ("decode: 3", "decode", "a section of keys"),
        ("gateway: {port: 8265}", "the file", "must differ"),
        ("1: 2", "1", "strings"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_limit(tmp_path, text, key, limit):
    error = refused(tmp_path, "model: {folder: x}\n" + text)
    assert error.reason == "INVALID_VALUE"
    assert error.field.endswith(f": {key}")
    assert limit in error.limit


def test_a_missing_folder_is_told(tmp_path):
    assert refused(tmp_path, "model: {name: x}").field.endswith(": model.folder")
    assert refused(tmp_path, "gateway: {port: 1}").field.endswith(": model")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {folder: x}\nmodel: {folder: y}", "'model' stands twice"),
        ("model: {folder: x, folder: y}", "'folder' stands twice"),
        ("model: [", "line 1"),
        ("a: !!python/object/apply:os.getcwd []", "python/object"),
        ("[" * 20000, "nested"),
        ("# " + "x" * 70000, "too large"),
        ("a: \x00", "special characters"),
        ("? [a]\n: b", "unhashable"),
        ("a: 2012-99-01", "month"),
    ],
)
def test_what_is_no_plain_yaml(tmp_path, text, told):
    error = refused(tmp_path, text)
    assert error.reason == "UNREADABLE_CONFIG"
    assert told in error.message


@pytest.mark.parametrize("text", ["", "[1]", "just text", "model: &a [*a]"])
def test_what_is_no_configuration(tmp_path, text):
    refused(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidConfig, match="No such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("256MiB", 2**28), ("1.5 GB", 1_500_000_000), ("3kb", 3000), ("0B", 0), (17, 17)]
)
def test_sizes_have_units(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["12", "-1MiB", "1e9B", "MiB", "1 PiB", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="256MiB"):
        parse_bytes(text)


def test_overrides_are_checked_like_the_file(tmp_path, monkeypatch):
    config = load(
        tmp_path, "model: {folder: x, name: old, compute_dtype: bfloat16}\ngateway: {host: 0.0.0.0}"
    )
    monkeypatch.chdir(tmp_path)
    changed = config.with_overrides(model=Path("other"), prefill=2, decode=3, shards=4, port=0)
    assert changed.model.folder == tmp_path / "other"
    assert (changed.model.served_name, changed.model.compute_dtype) == ("other", "bfloat16")
    assert (changed.prefill.count, changed.decode.count, changed.experts.shards_count) == (2, 3, 4)
    assert (changed.gateway.port, changed.gateway.host) == (0, "0.0.0.0")
    assert config.with_overrides() == config
    with pytest.raises(InvalidConfig, match=r"command line: .*prefill\.count"):
        config.with_overrides(prefill=0)


def test_a_dump_is_a_configuration_again():
    config = load_config(LOCAL)
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert check_config(yaml.safe_load(text), source="dump", folder=Path("/")) == config


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"decode": {"count_min": 4, "count_max": 2}}, "decode.count: its least, 4, is above its most, 2"),
        ({"experts": {"shards_min": 3}}, "experts.shards_count: its least, 3, is above its most, 2"),
        ({"decode": {"count": 16}, "autoscaler": {"enabled": True}}, "decode.count is 16"),
        ({"prefill": {"count_min": 2}, "autoscaler": {"enabled": True}}, "prefill.count is 1"),
    ],
)
def test_counts_lie_within_their_bounds(sections, said, tmp_path):
    with pytest.raises(InvalidConfig) as caught:
        check_config({"model": {"folder": "x"}, **sections}, "test", tmp_path)
    assert said in str(caught.value)


def test_the_autoscaler_wants_a_pool_that_prompts_press_on(tmp_path):
    both = {"decode": {"reads_prompts": True}, "prefill": {"count": 0}}
    check_config({"model": {"folder": "x"}, **both}, "test", tmp_path)
    with pytest.raises(InvalidConfig, match=r"none would grow; set prefill.count to 1 or more"):
        check_config({"model": {"folder": "x"}, **both, "autoscaler": {"enabled": True}}, "test", tmp_path)


def test_without_autoscaler_people_count_as_they_like(tmp_path):
    check_config({"model": {"folder": "x"}, "decode": {"count": 16}}, "test", tmp_path)


def test_a_path_through_links_stays_as_it_was_named(tmp_path):
    """Where a folder is mounted, what its links lead to has another name a moment later, or elsewhere."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "secrets").symlink_to("..data/secrets")
    values = {"model": {"folder": "x"}, "gateway": {"token_file": "secrets/gateway-token"}}
    config = check_config(values, "test", tmp_path)
    assert config.gateway.token_file == tmp_path / "secrets/gateway-token"


@pytest.mark.parametrize(
    "sections",
    [
        {"gateway": {"port": 8266}},
        {"gateway": {"metrics_port": 8265}},
        {"dashboard": {"port": 8266}},
        {"gateway": {"port": 9000, "metrics_port": 9000}},
    ],
)
def test_ports_differ(sections, tmp_path):
    with pytest.raises(InvalidConfig, match="must differ"):
        check_config({"model": {"folder": "x"}, **sections}, "test", tmp_path)


def test_ports_of_what_is_switched_off_may_be_taken(tmp_path):
    sections = {"gateway": {"port": 8266}, "operations": {"enabled": False}}
    check_config({"model": {"folder": "x"}, **sections}, "test", tmp_path)
