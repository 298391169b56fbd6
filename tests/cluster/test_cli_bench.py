"""`trivium bench` without a cluster: what it hands on and what it refuses."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import cli, cli_bench
from cluster.bench.settings import BenchSettings, LengthShape, LoadSettings, from_json


@pytest.fixture
def became(monkeypatch) -> list[tuple[str, ...]]:
    """What a command would have become."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli_bench, "become", lambda *arguments: calls.append(arguments))
    return calls


def run(*arguments: str):
    """One command line, as wide as it likes."""
    environment = {"COLUMNS": "1000", "TERM": "dumb", "TRIVIUM_ADDRESS": None}
    return CliRunner().invoke(cli.app, ("bench", *arguments), env=environment)


def test_alone_it_has_defaults(became):
    assert run().exit_code == 0
    [(module, settings)] = became
    assert module == "cluster.bench.main"
    assert from_json(settings) == BenchSettings(address="127.0.0.1:50051")
    assert LoadSettings() == LoadSettings(profile="azure-conversation", scale=1 / 64, rate_per_s=2.0)


def test_it_hands_on_what_was_asked(became, tmp_path):
    words = (
        "--profile azure-code --scale 1/8 --rate 5 --duration-s 7 --cv 2 --burst 3 --burst-period-s 4 "
        "--prefix-share 0.5 --prompt-tokens 100/90/300 --output-tokens 20 --priorities=-1,1 --seed 9 "
        "--speed 2 --slo-ttft-s 0.3 --slo-itl-s 0.02 --timeout-s 11 --connections 3 --address a:1 --json "
        f"--trace t.jsonl --output {tmp_path}/r.html --output {tmp_path}/r.png --token-file secret"
    )
    assert run(*words.split()).exit_code == 0
    [(_, settings)] = became
    assert from_json(settings) == BenchSettings(
        load=LoadSettings(
            profile="azure-code",
            scale=1 / 8,
            rate_per_s=5.0,
            duration_s=7.0,
            gap_cv=2.0,
            burst_factor=3.0,
            burst_period_s=4.0,
            prefix_share=0.5,
            prompt=LengthShape(100, 90, 300),
            output=LengthShape(20, 20, 20),
            priorities=(-1, 1),
            seed=9,
            trace=Path("t.jsonl"),
            speed=2.0,
        ),
        address="a:1",
        token_file=Path("secret"),
        timeout_s=11.0,
        connections_count=3,
        slo_ttft_s=0.3,
        slo_itl_s=0.02,
        outputs=(tmp_path / "r.html", tmp_path / "r.png"),
        json_output=True,
    )


def test_compare_takes_the_same_load(became):
    assert run("compare", "a.yaml", "b.yaml", "--rate", "3", "--seed", "2").exit_code == 0
    [(_, settings)] = became
    assert from_json(settings) == BenchSettings(
        load=LoadSettings(rate_per_s=3.0, seed=2), configs=(Path("a.yaml"), Path("b.yaml"))
    )


@pytest.mark.parametrize(
    "words",
    [
        "--profile other",
        "--scale 1/0",
        "--scale 0",
        "--scale much",
        "--rate 0",
        "--rate nan",
        "--rate 1e9",
        "--duration-s 0",
        "--duration-s inf",
        "--cv 0",
        "--burst 0.5",
        "--burst-period-s 0",
        "--prefix-share 1.1",
        "--prompt-tokens 1/2",
        "--prompt-tokens 1/2/1",
        "--output-tokens 0",
        "--output-tokens inf",
        "--priorities 1,x",
        "--priorities 101",
        "--seed -1",
        "--speed 0",
        "--slo-ttft-s 0",
        "--slo-itl-s 0",
        "--timeout-s 0",
        "--connections 65",
        "--output report.pdf",
        "--output missing/report.html",
    ],
)
@pytest.mark.parametrize("command", [(), ("compare", "a.yaml")])
def test_what_is_out_of_bounds_is_refused_by_name(became, words, command):
    done = run(*command, *words.split())
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith(f"error {words.split()[0]}: ")
    assert became == []


def test_too_many_clusters_are_refused(became):
    done = run("compare", *(f"{number}.yaml" for number in range(9)))
    assert (done.exit_code, became) == (1, [])
    assert "CONFIG" in done.stderr


def test_the_help_has_examples_that_are_understood(became):
    for command in ((), ("compare",)):
        done = run(*command, "--help")
        assert done.exit_code == 0
        examples = [line.strip().removeprefix("Example: ") for line in done.output.splitlines()]
        examples = [line for line in examples if line.startswith("trivium bench ")]
        assert examples
        for example in examples:
            assert run(*example.split()[2:]).exit_code == 0, example
    assert len(became) == 4
