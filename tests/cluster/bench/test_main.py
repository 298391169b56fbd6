"""Benchmarks from their settings to what is printed, against a gateway that answers by a script."""

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import typer

from cluster.bench import main as bench_main
from cluster.bench.main import bench, main, status_of, targets_of
from cluster.bench.serving import Target
from cluster.bench.settings import BenchSettings, LoadSettings, as_json
from cluster.client import Admitted, Delta, Finished
from cluster.errors import InvalidRequest, Overloaded
from cluster.gateway_messages import Timing, Usage

NOT_COUNTED = 1 + 10
"""Requests before those of `FAST`: one, and as many as it has at once."""
FAST = LoadSettings(rate_per_s=40.0, duration_s=0.25, gap_cv=0.1)


class FakeClient:
    """A gateway that gives every request its tokens at once; what it is like is in its address."""

    def __init__(self, address, token=None):
        self.address = address
        self.asked_count = 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def get_model(self):
        contexts = {"short": 64}
        return SimpleNamespace(vocab_size=100, context_tokens_max=contexts.get(self.address, 512))

    async def generate(self, request, timeout_s):
        self.asked_count += 1
        if self.address == "shedding" and self.asked_count > 1:
            raise Overloaded("QUEUE_FULL", "full")
        if self.address == "hanging" and self.asked_count > NOT_COUNTED:
            await asyncio.sleep(60)
        count = request.sampling.tokens_max
        yield Admitted("r", len(request.token_ids), 0)
        yield Delta("x", tuple(range(count)), ())
        yield Finished("length", Usage(len(request.token_ids), 0, count), Timing(0, 0, 0, 0, 0))


@pytest.fixture(autouse=True)
def clients(monkeypatch):
    """No real gateway anywhere."""
    monkeypatch.setattr(bench_main, "Client", FakeClient)


def targets(*names: str, events: list[str] | None = None):
    """Clusters that start and end, and say so."""

    @asynccontextmanager
    async def opening(name):
        (events if events is not None else []).append(f"start {name}")
        yield Target(name, None)
        (events if events is not None else []).append(f"end {name}")

    return [(name, partial(opening, name)) for name in names]


def benched(settings: BenchSettings, targets) -> list:
    """The reports of a benchmark that ends well."""
    reports = []
    asyncio.run(bench(settings, targets, reports))
    return reports


def test_clusters_are_compared_one_after_the_other_under_one_load():
    events: list[str] = []
    first, second = benched(BenchSettings(load=FAST), targets("a", "b", events=events))
    assert events == ["start a", "end a", "start b", "end b"]
    assert (first.name, second.name) == ("a", "b")
    assert first.outcomes.completed == second.outcomes.completed == 10
    assert first.offer == second.offer


def test_models_that_cannot_be_sent_the_same_are_refused():
    settings = BenchSettings(
        load=LoadSettings(profile="mooncake-conversation", rate_per_s=40, duration_s=0.1)
    )
    with pytest.raises(InvalidRequest, match="another context"):
        benched(settings, targets("a", "short"))


def test_an_interruption_reports_what_was_and_leaves_out_the_rest():
    async def work(names):
        reports = []
        task = asyncio.create_task(bench(BenchSettings(load=FAST), targets(*names), reports))
        await asyncio.sleep(0.6)
        task.cancel()
        await task
        return reports

    reports = asyncio.run(work(("a", "hanging", "b")))
    assert [report.name for report in reports] == ["a", "hanging"]
    assert reports[1].was_interrupted
    assert reports[1].outcomes.cancelled == 10
    assert status_of(reports, ["b"]) == status_of(reports, []) == 130


def test_an_interruption_while_a_later_cluster_starts_is_told(capsys, monkeypatch):
    @asynccontextmanager
    async def starting():
        os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C does, which a process in the background ignores
        await asyncio.sleep(10)
        yield

    both = [*targets("a"), ("b", starting), *targets("c")]
    monkeypatch.setattr(bench_main, "targets_of", lambda settings: both)
    assert ended(BenchSettings(load=FAST, json_output=True)) == 130
    said = capsys.readouterr()
    assert [report["name"] for report in json.loads(said.out)["reports"]] == ["a"]
    assert "interrupted before b, c" in said.err


def test_names_are_told_apart(tmp_path):
    same = BenchSettings(configs=(tmp_path / "a" / "x.yaml", tmp_path / "b" / "x.yaml"))
    assert [name for name, _ in targets_of(same)] == [str(config) for config in same.configs]
    other = BenchSettings(configs=(tmp_path / "a.yaml", tmp_path / "b.yaml"))
    assert [name for name, _ in targets_of(other)] == ["a", "b"]
    assert [name for name, _ in targets_of(BenchSettings(address="here:1"))] == ["here:1"]


def ended(settings: BenchSettings) -> int:
    """The status with which the process would end."""
    with pytest.raises(typer.Exit) as exit:
        main(as_json(settings))
    return exit.value.exit_code


def test_the_process_prints_and_writes(capsys, tmp_path):
    outputs = (tmp_path / "r.json", tmp_path / "r.html")
    assert ended(BenchSettings(load=FAST, address="here", outputs=outputs)) == 0
    said = capsys.readouterr()
    assert "requests completed" in said.out
    assert "r.html" in said.err
    assert json.loads(outputs[0].read_text())["reports"][0]["outcomes"]["completed"] == 10


@pytest.mark.parametrize("error", [InvalidRequest("BAD", "no start"), RuntimeError("no start")])
def test_what_was_measured_is_told_when_a_later_cluster_does_not_start(capsys, tmp_path, monkeypatch, error):
    @asynccontextmanager
    async def failing():
        raise error
        yield

    both = [*targets("a"), ("b", failing)]
    monkeypatch.setattr(bench_main, "targets_of", lambda settings: both)
    output = tmp_path / "r.json"
    with pytest.raises((typer.Exit, RuntimeError)):
        main(as_json(BenchSettings(load=FAST, outputs=(output,), json_output=True)))
    said = capsys.readouterr()
    assert [report["name"] for report in json.loads(said.out)["reports"]] == ["a"]
    assert [report["name"] for report in json.loads(output.read_text())["reports"]] == ["a"]
    assert isinstance(error, RuntimeError) or "no start" in said.err


def test_json_is_alone_on_stdout_and_a_cluster_that_sheds_all_ends_with_1(capsys):
    assert ended(BenchSettings(load=FAST, address="shedding", json_output=True)) == 1
    [report] = json.loads(capsys.readouterr().out)["reports"]
    assert report["outcomes"]["shed"] == 10
    assert report["goodput"]["share"] == 0.0


def test_an_error_before_the_load_is_told(capsys, tmp_path):
    load = LoadSettings(trace=tmp_path / "missing.jsonl")
    assert ended(BenchSettings(load=load, address="here")) == 1
    assert "--trace: missing.jsonl cannot be read" in capsys.readouterr().err
