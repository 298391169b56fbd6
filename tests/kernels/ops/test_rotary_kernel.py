"""The turn's kernel against its reference: heads that fill no program, parts of wider rows, no tokens."""

from contextlib import nullcontext

import pytest
import torch

from kernels.ops.backend import kernels_forced
from kernels.ops.rotary import rotate, rotate_reference, rotation
from kernels.ops.rotary_kernel import rotate_kernel

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def turns(tokens_count: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of some positions, scaled as YaRN scales them."""
    frequencies = 10000.0 ** (-torch.arange(pairs) / pairs)
    return rotation(torch.randint(0, 4096, (tokens_count,)), frequencies, 1.2)


def turned(hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool, device):
    """A copy of `hidden`, turned by the kernel."""
    copy = hidden.to(device, copy=True)
    rotate_kernel(copy, cosines.to(device), sines.to(device), interleaved)
    return copy.cpu()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 18), (1, 1, 64), (2, 40, 64), (3, 1, 2), (0, 4, 8)], ids=str)
def test_pairs_are_turned_as_in_the_reference(shape, dtype, interleaved, device):
    hidden, (cosines, sines) = torch.randn(shape).to(dtype), turns(shape[0], shape[2] // 2)
    expected = rotate_reference(hidden.double(), cosines.double(), sines.double(), interleaved)
    result = turned(hidden, cosines, sines, interleaved, device)
    assert result.dtype == dtype
    assert torch.allclose(result.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("interleaved", [True, False])
def test_only_the_given_part_of_wider_rows_is_read_and_written(interleaved, device):
    wide = torch.full((3, 5, 40), float("nan")).bfloat16()
    wide[..., 24:] = torch.randn(3, 5, 16).bfloat16()
    wide_turns = [torch.cat([part, torch.full_like(part, float("nan"))], dim=1) for part in turns(3, 8)]
    on_device = wide.to(device, copy=True)
    parts = [part.to(device)[:, :8] for part in wide_turns]
    rotate_kernel(on_device[..., 24:], *parts, interleaved)
    expected = rotate_reference(wide[..., 24:], *(part[:, :8] for part in wide_turns), interleaved)
    assert torch.allclose(on_device[..., 24:].cpu().float(), expected.float(), rtol=2**-7, atol=2**-7)
    assert torch.equal(on_device[..., :24].cpu().view(torch.int16), wide[..., :24].view(torch.int16))


def test_a_token_keeps_its_bits_in_any_company(device):
    hidden, (cosines, sines) = torch.randn(5, 3, 16).bfloat16(), turns(5, 8)
    together = turned(hidden, cosines, sines, True, device)
    for token in range(5):
        some = slice(token, token + 1)
        alone = turned(hidden[some], cosines[some], sines[some], True, device)
        assert torch.equal(alone, together[some])


def test_the_operation_runs_its_kernel_where_kernels_run(device, monkeypatch):
    launched = []
    monkeypatch.setattr("kernels.ops.rotary.rotate_kernel", lambda *given: launched.append(given))
    with nullcontext() if device.type == "cuda" else kernels_forced():
        rotate(torch.randn(2, 3, 8, device=device), *(part.to(device) for part in turns(2, 4)))
    assert len(launched) == 1 and launched[0][3] is True
