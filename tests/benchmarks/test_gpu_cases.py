"""Every case runs and is right at tiny sizes; what is wrong, missing or late is told and not timed."""

import json
import time
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import kernels
from benchmarks.gpu import peers
from benchmarks.gpu.case import Case, Ready, relative_error, share_differing
from benchmarks.gpu.roofline import H200
from benchmarks.gpu.run_cases import OURS, Runner
from benchmarks.gpu.sizes import FEW, QUICK, TINY, V3, WHOLE
from benchmarks.gpu.tiles import put
from benchmarks.gpu.timing import HostTimer, Measured
from benchmarks.gpu.work import Work
from kernels.ops import expert_bank_kernel, mla_decode_kernel
from kernels.ops.backend import IS_INTERPRETED, kernels_forced

LATER_S = 600.0


class FixedTimer:
    """Every call takes ten microseconds."""

    def measure(self, run):
        """Call it once."""
        run()
        return Measured(10.0)


def results_of(path) -> list[dict]:
    """Results among the notes."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "begins" not in line]


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_every_case_is_right_at_tiny_sizes(operation, device, tmp_path):
    asked = list(kernels.cases(TINY, FEW, operation))
    runner = Runner(device, HostTimer(), H200, tmp_path / "notes")
    runner.run(asked, time.time() + LATER_S, kernels_forced() if IS_INTERPRETED else nullcontext())
    results = results_of(tmp_path / "notes")
    assert len(results) == len(asked)
    assert [result for result in results if "failed" in result] == []
    peers = [one for result in results for one in result["peers"].items()]
    assert [name for name, one in peers if "failed" in one and name.startswith(("torch", "ours"))] == []


def test_products_are_compared_with_those_of_torch_and_not_with_our_own(device, monkeypatch):
    [first, *_] = kernels.cases(TINY, FEW, "linear_fp8")
    with kernels_forced() if IS_INTERPRETED else nullcontext():
        case = first.make(device)
        monkeypatch.setattr("kernels.ops.linear.linear_kernel", None)
        assert case.error() <= case.tolerance


def test_names_are_unique_and_quick_sizes_are_some_of_all():
    for counts in (WHOLE, QUICK):
        names = [case.name for case in kernels.cases(V3, counts, "")]
        assert len(names) == len(set(names))
    assert all(set(getattr(QUICK, field.name)) <= set(getattr(WHOLE, field.name)) for field in fields(WHOLE))


def test_the_cases_of_the_bar_are_among_them():
    names = {case.name for case in kernels.cases(V3, WHOLE, "")}
    for requests in (1, 8, 32, 128):
        for context in (1024, 4096, 16384, 65536):
            assert f"mla_decode {requests} x {context}, 128 heads, bf16 latents" in names
            assert f"mla_decode {requests} x {context}, 16 heads, FP8 latents" in names
    for tokens in (1, 8, 32, 128, 512):
        assert f"experts masked, {tokens} tokens, 256 experts, fp8" in names
        assert f"experts contiguous, {tokens} tokens, 32 experts, bf16" in names
    assert {f"mla_prefill {1024 << power} tokens, 128 heads" for power in range(6)} <= names


def ready(value: float, peers: dict | None = None) -> Ready:
    """A case that gives ones times a value, which should be ones."""
    ones = torch.ones(4)
    error = relative_error(ones * value, ones)
    return Ready(lambda: ones * value, Work(10**9, 43 * 10**6), lambda: error, peers or {})


def run_made(tmp_path, made: dict[str, Ready], end_s=LATER_S, skipped=()) -> dict[str, dict]:
    """Results by size of cases that give what was made for them, or raise it."""

    def make(name):
        def give(_):
            if isinstance(made[name], Exception):
                raise made[name]
            return made[name]

        return give

    runner = Runner(torch.device("cpu"), FixedTimer(), H200, tmp_path / "notes", skipped)
    runner.run([Case("op", name, make(name)) for name in made], time.time() + end_s, nullcontext())
    return {result["sizes"]: result for result in results_of(tmp_path / "notes")}


def test_what_is_wrong_is_not_timed_and_others_go_on(tmp_path):
    made = {
        "wrong": ready(1.5),
        "nan": ready(float("nan")),
        "raises": MemoryError("no room"),
        "right": ready(1),
    }
    results = run_made(tmp_path, made)
    assert results["wrong"]["failed"] == "wrong: relative error 0.5, at most 0.01"
    assert "wrong" in results["nan"]["failed"]
    assert results["raises"]["failed"] == "MemoryError: no room"
    assert results["right"]["us"] == 10.0
    assert results["right"]["share"] == pytest.approx(1.0)
    assert results["right"]["tflop/s"] == 100.0


def test_peers_are_compared_and_their_failures_told(tmp_path):
    def no_such_call():
        raise AttributeError("no such operation")

    peers = {
        "same": lambda: lambda: torch.ones(4),
        "other form": lambda: lambda: None,
        "different": lambda: lambda: torch.zeros(4),
        "another version": no_such_call,
        "lost": lambda: lambda: torch.ones(4),
    }
    result = run_made(tmp_path, {"case": ready(1, peers)}, skipped=[("op", "lost")])["case"]
    told = result["peers"]
    assert told["same"] == told["other form"] == {"us": 10.0, "ours is faster by": 1.0}
    assert told["different"] == {"failed": "differs from ours by 1"}
    assert told["another version"] == {"failed": "AttributeError: no such operation"}
    assert "hung" in told["lost"]["failed"]


def test_cases_that_are_done_or_late_are_not_run(tmp_path):
    results = run_made(tmp_path, {"done": ready(1), "left": ready(1)}, skipped=[("op done", OURS)])
    assert list(results) == ["left"]
    results = run_made(tmp_path, {"late": ready(1)}, end_s=-1)
    assert "time was up" in results["late"]["failed"]


def test_errors_of_other_shapes_are_no_numbers():
    assert relative_error(torch.ones(2), torch.ones(3)) != relative_error(torch.ones(2), torch.ones(3))
    assert share_differing(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_is_needed(capsys):
    with pytest.raises(SystemExit) as ended:
        kernels.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == kernels.NO_GPU


@pytest.fixture
def with_gpu(monkeypatch):
    """As if there were one: what is asked of the process that measures."""
    asked = []
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "measure", lambda *given: asked.append(given))
    app = typer.Typer()
    app.command()(kernels.main)
    return asked, lambda options: CliRunner().invoke(app, options)


def test_the_process_that_measures_understands_what_it_is_told(with_gpu, monkeypatch, tmp_path):
    asked, call = with_gpu

    def supervised(command, folder, stall_s, end_s, tell):
        (folder / "limits").write_text('{"roofline": {}}')
        told = command(folder / "skipped")
        assert told[1:3] == ["-m", "benchmarks.kernels"]
        answer = call(told[3:])
        assert answer.exit_code == 0, answer.output
        tell({"operation": "gate", "sizes": "1", "failed": "wrong"})

    monkeypatch.setattr(kernels, "supervise", supervised)
    output = tmp_path / "figures.json"
    monkeypatch.setattr(mla_decode_kernel, "WIDE", mla_decode_kernel.WIDE)
    options = ["--only", "gate,mix", "--quick", "--warm", "--peers", str(tmp_path), "--output", str(output)]
    answer = call([*options, "--tile", "wide=64,32,8,3"])
    assert answer.exit_code == 0, answer.output
    assert mla_decode_kernel.WIDE == (64, 32, 8, 3, 1)
    [(cases, peers, warm, notes, skipped, end_s)] = asked
    assert {case.operation for case in cases} == {"gate", "mix"}
    assert (peers, warm, notes.name, skipped.name) == (tmp_path, True, "notes", "skipped")
    assert 0 < end_s - time.time() <= kernels.QUICK_TIME_S
    assert json.loads(output.read_text())["results"] == [
        {"operation": "gate", "sizes": "1", "failed": "wrong"}
    ]


def test_a_name_that_is_no_operation_is_refused(with_gpu):
    answer = with_gpu[1](["--only", "gatte"])
    assert answer.exit_code == 2
    assert "gatte" in answer.output


@pytest.mark.parametrize(
    "asked", ["wide", "wide=64,32,8", "narrow=16,32,4,3", "wide=64,32,8,3.5", "wide=64,32,8,3,x"]
)
def test_a_tile_that_is_none_is_refused(with_gpu, asked):
    answer = with_gpu[1](["--tile", asked])
    assert answer.exit_code == 2
    assert "fp8_down" in answer.output


def test_a_tile_is_put_in_one_place_alone(monkeypatch):
    shipped = dict(expert_bank_kernel.TILES)
    monkeypatch.setattr(expert_bank_kernel, "TILES", dict(shipped))
    put("fp8_down=64,128,8,4")
    changed = expert_bank_kernel.TILES.pop(torch.float8_e4m3fn)
    *fewer, many = shipped.pop(torch.float8_e4m3fn)
    assert changed == (*fewer, replace(many, down=expert_bank_kernel.Tile(64, 128, 8, 4)))
    assert shipped == expert_bank_kernel.TILES


def test_limits_are_measured_once_and_what_is_done_is_passed_over(monkeypatch, tmp_path):
    made, measured = [], []

    class Recording:
        def __init__(self, device, timer, roofline, notes, skipped):
            made.append((device.type, roofline, skipped))

        def run(self, *_):
            """Nothing."""

    monkeypatch.setattr(kernels, "Runner", Recording)
    monkeypatch.setattr(kernels, "DeviceTimer", lambda warm: None)
    monkeypatch.setattr(kernels.gc, "freeze", lambda: None)
    monkeypatch.setattr(kernels, "measured_roofline", lambda: measured.append(1) or H200)
    (tmp_path / "skipped").write_text('[["gate 1", "ours"], ["gate", "torch"]]')
    for _ in range(2):
        kernels.measure([], tmp_path, False, tmp_path / "notes", tmp_path / "skipped", 0.0)
    assert len(measured) == 1
    assert made == 2 * [("cuda", H200, [("gate 1", "ours"), ("gate", "torch")])]
    assert json.loads((tmp_path / "limits").read_text())["peers"]["torch"] == torch.__version__


def test_peers_are_found_in_a_folder_and_failures_to_load_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.sys, "path", list(peers.sys.path))
    (tmp_path / "deep_gemm.py").write_text("__version__ = '9'")
    (tmp_path / "flash_mla.py").write_text("raise OSError('no driver')")
    (tmp_path / "_some_C.abi3.so").write_bytes(b"no library")
    peers.module_of.cache_clear()
    failures = peers.load_folder(tmp_path)
    assert [failure.split(":")[0] for failure in failures] == ["_some_C.abi3.so"]
    assert peers.found_peers() == {"torch": torch.__version__, "DeepGEMM": "9"}
    peers.module_of.cache_clear()
    peers.sys.modules.pop("deep_gemm")


def test_figures_are_kept_while_they_come(tmp_path):
    (tmp_path / "limits").write_text('{"machine": {"torch": "2"}}')
    kernels.keep(tmp_path / "out/f.json", tmp_path / "limits", [{"operation": "a"}, {"operation": "b"}])
    kept = json.loads((tmp_path / "out/f.json").read_text())
    assert kept == {"about": {"machine": {"torch": "2"}}, "results": [{"operation": "a"}, {"operation": "b"}]}
    kernels.keep(tmp_path / "none.json", tmp_path / "missing", [])
    assert json.loads((tmp_path / "none.json").read_text()) == {"about": {}, "results": []}
