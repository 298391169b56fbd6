"""The command line without a cluster: what it hands on, what it refuses, and how it tells."""

import json
import re

import pytest
from typer.testing import CliRunner

from cluster import cli, cli_experts, cli_operations
from cluster.client import Admitted, Delta
from cluster.errors import Overloaded

SMALL = "examples/trivium-small"
NOBODY = ("--address", "127.0.0.1:1")


@pytest.fixture
def became(monkeypatch) -> list[tuple[str, ...]]:
    """What a command would have become."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "become", lambda *arguments: calls.append(arguments))
    return calls


def run(*arguments: str):
    """One command line, as wide as it likes."""
    return CliRunner().invoke(
        cli.app, arguments, env={"COLUMNS": "1000", "TERM": "dumb", "TRIVIUM_ADDRESS": None}
    )


def examples() -> list[str]:
    """The examples in each command's help."""
    apps = (cli.app, cli.config_app, cli.experts_app)
    commands = [command for app in apps for command in app.registered_commands]
    lines = [line for command in commands for line in command.epilog.splitlines()]
    examples = [line.removeprefix("Example: ") for line in lines]
    return [line for line in examples if line.startswith("trivium")]


def test_every_example_in_the_help_is_understood(became, monkeypatch):
    for module in (cli, cli_experts, cli_operations):
        monkeypatch.setattr(module, "run", lambda work: work.close())
    assert len(examples()) == 11
    for example in examples():
        words = [word or text for text, word in re.findall(r'"([^"]*)"|(\S+)', example)]
        assert words[0] == "trivium"
        done = run(*words[1:])
        assert done.exit_code == 0, f"{example}: {done.output}"
    assert [arguments[0] for arguments in became] == ["cluster.launch", "cluster.reference_run"]


def test_every_command_has_help():
    plain = ("serve", "generate", "reference", "status", "config", "experts", "scale", "top", "bench")
    for command in (*plain, "config check", "config show", "experts plan", "experts move"):
        done = run(*command.split(), "--help")
        assert done.exit_code == 0
        assert "Usage" in done.output


def test_serve_hands_on_what_was_asked(became):
    done = run(
        "serve", "examples/local.yaml", "--decode", "3", "--shards", "4", "--port", "0", "--once", "--greet"
    )
    assert done.exit_code == 0
    [(module, config, *flags)] = became
    values = json.loads(config)
    assert module == "cluster.launch"
    assert flags == ["--greeting", "--once"]
    assert (values["decode"]["count"], values["experts"]["shards_count"], values["gateway"]["port"]) == (
        3,
        4,
        0,
    )


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("serve",), "CONFIG or --model"),
        (("serve", "missing.yaml"), "missing.yaml"),
        (("serve", "--model", SMALL, "--decode", "0"), "command line: decode.count"),
        (("generate",), "TEXT or --token-ids"),
        (("generate", "text", "--token-ids", "1"), "TEXT or --token-ids"),
        (("generate", "--token-ids", "1;2"), "--token-ids"),
        (("generate", "--token-ids", "1", "--chat"), "--chat"),
        (("generate", "--token-ids", "99999999999999999999", *NOBODY), "request"),
        (("generate", "text", "--seed", "-1", *NOBODY), "request"),
        (("generate", "text", "--token-file", "[/missing]", *NOBODY), "--token-file"),
        (("generate", "text", *NOBODY), "address"),
        (("status", *NOBODY), "address"),
        (("reference", "text"), "CONFIG or --model"),
        (("config", "check", "[/missing].yaml"), "[/missing].yaml"),
    ],
)
def test_errors_go_to_stderr_and_end_with_1(became, arguments, field):
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert f"error {field}" in done.stderr
    assert done.stdout == ""
    assert became == []


def test_errors_are_json_too_where_json_was_asked_for(monkeypatch):
    for arguments in (("generate", "text", *NOBODY), ("status", *NOBODY), ("reference", "text")):
        done = run(*arguments, "--json")
        assert done.exit_code == 1
        error = json.loads(done.stdout)["error"]
        assert set(error) == {"kind", "reason", "message", "field", "limit", "remedy", "retry_after_s"}
        assert done.stderr.startswith("error ")


def test_an_error_in_mid_stream_gives_one_json_document(monkeypatch):
    async def generate(self, request, timeout_s=None):
        yield Admitted("r", 1, 2)
        yield Delta("half", (1,), ())
        raise Overloaded("FULL", "full", retry_after_s=2.0)

    monkeypatch.setattr(cli.Client, "generate", generate)
    done = run("generate", "text", "--json", *NOBODY)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["retry_after_s"] == 2.0


def test_ctrl_c_ends_with_130(monkeypatch):
    async def generate(self, request, timeout_s=None):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(cli.Client, "generate", generate)
    assert run("generate", "text", *NOBODY).exit_code == 130


def test_config_show_and_check():
    shown = run("config", "show", "examples/local.yaml", "--json")
    assert json.loads(shown.stdout)["decode"]["requests_max"] == 64
    assert "gateway.stall_timeout_s" in run("config", "show").stdout
    checked = run("config", "check", "examples/local.yaml")
    assert checked.exit_code == 0
    assert "valid examples/local.yaml" in checked.stdout
