"""Machine code is kept where it can be, never for another source; loops refuse what does not fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.ops.expert_mlp import GatedWeights, expert_mlp
from kernels.ops.gate import gate_noaux_tc
from kernels.ops.linear import linear_by_head
from kernels.ops.machine_code import kept_folder
from kernels.ops.mix import mix
from kernels.ops.mla_decode import mla_decode
from kernels.ops.rms_norm import rms_norm
from kernels.ops.rotary import rotate


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file with code."""
    path = tmp_path / "code.py"
    path.write_text("one = 1\n")
    return path


def test_another_source_has_another_place(source):
    first = kept_folder(source, [source])
    assert first == kept_folder(source, [source]) and first.parent == source.parent / "__pycache__"
    source.write_text("one = 2\n")
    assert kept_folder(source, [source]) != first


def test_what_was_cut_short_is_thrown_away(source):
    folder = kept_folder(source, [source])
    for name, content in (("empty.nbi", b""), ("whole.nbc", b"code")):
        (folder / name).write_bytes(content)
    kept_folder(source, [source])
    assert [path.name for path in folder.iterdir()] == ["whole.nbc"]


def test_without_a_place_beside_the_code_it_goes_to_the_users_cache(source, monkeypatch, tmp_path):
    (source.parent / "__pycache__").write_text("a file, where no folder can be")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert kept_folder(source, [source]).parent == tmp_path / "home" / ".cache" / "trivium"
    monkeypatch.setenv("HOME", str(source))
    assert kept_folder(source, [source]) is None


def test_a_damaged_file_stops_nobody(tmp_path):
    """Compiled once, cut off in the middle, read again."""
    script = tmp_path / "doubled.py"
    script.write_text(
        "from pathlib import Path\n"
        "from kernels.ops.machine_code import AS_WRITTEN, machine_code\n"
        "def doubled(number):\n    return 2 * number\n"
        'print(machine_code(doubled, "int64(int64)", AS_WRITTEN, [Path(__file__)])(3))\n'
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(script)],
            env={"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path.cwd()), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.strip() == "6", done.stderr
        kept = list(tmp_path.rglob("*.nb[ic]"))
        assert kept
        for path in kept:
            path.write_bytes(path.read_bytes()[:20])


MISFITS = {
    "norm": lambda: rms_norm(torch.ones(2, 8), torch.ones(9), 1e-6),
    "norm of three dimensions": lambda: rms_norm(torch.ones(2, 2, 8), torch.ones(8), 1e-6),
    "turns too wide": lambda: rotate(torch.ones(2, 1, 8), torch.ones(2, 5), torch.ones(2, 5)),
    "turns too few": lambda: rotate(torch.ones(2, 1, 8), torch.ones(1, 4), torch.ones(1, 4)),
    "products by head": lambda: linear_by_head(torch.ones(2, 3, 8), torch.ones(3, 4, 64)),
    "mixture": lambda: mix(torch.ones(5, 8), torch.ones(2, 2), torch.arange(5)),
    "gate": lambda: gate_noaux_tc(torch.ones(2, 8), torch.ones(9), 2, 1, 1, True, 1.0),
    "a context beyond its pages": lambda: decode_misfit(length=129),
    "a page that is not there": lambda: decode_misfit(page=4),
    "a slot's token that is not there": lambda: expert_mlp(
        torch.ones(2, 8), torch.tensor([2]), [small_expert()], [1]
    ),
    "hidden states of another size": lambda: expert_mlp(
        torch.ones(2, 64), torch.tensor([0]), [small_expert()], [1]
    ),
}


def small_expert() -> GatedWeights:
    """An expert for compiled loops, of hidden states of 8."""
    return GatedWeights.of(torch.ones(8, 8), torch.ones(8, 4))


def decode_misfit(length: int = 5, page: int = 1) -> torch.Tensor:
    """One request over four pages."""
    pages, lengths = torch.tensor([[0, page]]).int(), torch.tensor([length]).int()
    return mla_decode(torch.ones(1, 2, 8), torch.ones(4, 64, 8), pages, lengths, 4, 1.0)


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_and_nothing_is_written(misfit):
    with pytest.raises(ValueError):
        misfit()


def test_one_logit_that_is_no_number_is_not_hidden():
    logits = torch.randn(3, 16)
    logits[1, 5] = float("nan")
    weights, ids = gate_noaux_tc(logits, None, 4, 4, 2, True, 2.5)
    assert weights[1].isnan().all() and not weights[[0, 2]].isnan().any()
    assert ((ids >= 0) & (ids < 16)).all()
