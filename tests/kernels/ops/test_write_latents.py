"""The write into pages: every layout of pairs and pages as its parts make it, and no other slot touched."""

from contextlib import nullcontext

import pytest
import torch

from kernels.ops.backend import kernels_forced
from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.latent_format import pack_latents_reference, unpack_latents_reference
from kernels.ops.rms_norm import rms_norm_reference
from kernels.ops.rotary import rotate_reference
from kernels.ops.write_latents import write_latents, write_latents_reference
from kernels.ops.write_latents_kernel import write_latents_kernel

EPS = 1e-6
V3, ODD = (512, 64), (260, 6)
TINY = (24, 8)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6}  # of the greatest number of a row
SLOTS = torch.tensor([4, -1, 0, 6, 1])


def inputs(dims: tuple[int, int], dtype: torch.dtype, tokens_count: int = len(SLOTS)) -> list[torch.Tensor]:
    """Projections, weight, cosines and sines."""
    down, weight = torch.randn(tokens_count, sum(dims)).to(dtype), torch.randn(dims[0]).to(dtype)
    angles = torch.rand(tokens_count, dims[1] // 2) * 6
    return [down, weight, angles.cos(), angles.sin()]


def poisoned(dims: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Seven slots of NaN; 0x7F is that of FP8."""
    if dtype == torch.uint8:
        return torch.full((7, packed_bytes(*dims)), 0x7F, dtype=dtype)
    return torch.full((7, sum(dims)), float("nan"), dtype=dtype)


def written(given, latents, device, interleaved=True, slots=SLOTS, run=write_latents_kernel):
    """What `latents` hold after a write on a device."""
    down, weight, cosines, sines = (tensor.to(device) for tensor in given)
    latents = latents.to(device, copy=True)
    run(down, weight, EPS, cosines, sines, interleaved, slots.to(device), latents)
    return latents.cpu()


def as_bytes(latents: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, for NaN is not equal to itself."""
    return latents.view(torch.uint8)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", [V3, ODD, TINY], ids=str)
def test_rows_are_normed_turned_and_put_into_their_slots(dims, dtype, interleaved, device):
    given = inputs(dims, dtype)
    down, weight, cosines, sines = (tensor.double() for tensor in given)
    value = rms_norm_reference(down[:, : dims[0]], weight, EPS)
    position = rotate_reference(down[:, None, dims[0] :], cosines, sines, interleaved)[:, 0]
    expected = torch.cat([value, position], dim=1)
    latents = written(given, poisoned(dims, dtype), device, interleaved).double()
    used = SLOTS >= 0
    tolerance = TOLERANCE[dtype]
    assert torch.allclose(latents[SLOTS[used]], expected[used], atol=tolerance * 4, rtol=tolerance)
    assert latents[[2, 3, 5]].isnan().all()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", [V3, ODD, TINY], ids=str)
def test_fp8_pages_hold_the_reference_s_bytes_of_the_same_numbers(dims, dtype, interleaved, device):
    """Rows of one magnitude, so that no order of adding squares tells, and weights of many."""
    given = inputs(dims, dtype)
    signs = torch.randn(len(SLOTS), dims[0]).sign()
    given[0][:, : dims[0]] = signs * torch.tensor([[1.0], [2], [4], [8], [0]])
    given[1] *= torch.randn(dims[0]).mul(4).exp().to(dtype)
    numbers = written(given, poisoned(dims, dtype), device, interleaved)
    packed = written(given, poisoned(dims, torch.uint8), device, interleaved)
    used = SLOTS[SLOTS >= 0]
    assert torch.equal(packed[used], pack_latents_reference(numbers[used], dims[0]))
    assert (packed[[2, 3, 5]] == 0x7F).all()


def test_fp8_pages_are_near_those_of_the_reference(device):
    given = inputs(V3, torch.bfloat16)
    rows = [
        unpack_latents_reference(written(given, poisoned(V3, torch.uint8), where, run=run)[SLOTS[2:]], 512)
        for where, run in ((device, write_latents_kernel), ("cpu", write_latents_reference))
    ]
    assert torch.allclose(*rows, rtol=2**-3, atol=2**-8)  # a last bit of bfloat16 may be a code's difference


@pytest.mark.parametrize("run", [write_latents_kernel, write_latents_reference])
def test_pages_of_another_dtype_hold_what_the_dtype_of_the_rows_can(run, device):
    device = device if run is write_latents_kernel else "cpu"
    """One magnitude again: the norm's last bit may depend on how a dtype is laid out in registers."""
    given = inputs(TINY, torch.bfloat16)
    given[0][:, :24] = given[0][:, :24].sign()
    narrow = written(given, poisoned(TINY, torch.bfloat16), device, run=run)
    wide = written(given, poisoned(TINY, torch.float32), device, run=run)
    used = SLOTS[SLOTS >= 0]
    assert torch.equal(wide[used], narrow[used].float()) and wide[[2, 3, 5]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_a_part_of_wide_rows_is_read_and_skipped_rows_may_hold_anything(dtype, device):
    down, *others = inputs(TINY, torch.bfloat16)
    wide = torch.full((len(SLOTS), 48 + sum(TINY) + 5), float("nan"), dtype=torch.bfloat16)
    part = wide.to(device)[:, 48 : 48 + sum(TINY)]
    part[SLOTS >= 0] = down[SLOTS >= 0].to(device)
    expected = written([down, *others], poisoned(TINY, dtype), device)
    assert torch.equal(as_bytes(written([part, *others], poisoned(TINY, dtype), device)), as_bytes(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_a_token_leaves_the_same_bits_in_any_company(dtype, device):
    given = inputs(TINY, torch.bfloat16)
    together = written(given, poisoned(TINY, dtype), device)
    down, weight, cosines, sines = given
    for token in (0, 2, 4):
        some = slice(token, token + 1)
        alone = [down[some], weight, cosines[some], sines[some]]
        latents = written(alone, poisoned(TINY, dtype), device, slots=SLOTS[some])
        assert torch.equal(as_bytes(latents[SLOTS[token]]), as_bytes(together[SLOTS[token]]))


@pytest.mark.parametrize("slots", [torch.empty(0, dtype=torch.int64), torch.tensor([-1, -7])], ids=len)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("run", [write_latents_kernel, write_latents_reference])
def test_nothing_is_written_where_no_token_has_a_slot(run, dtype, slots, device):
    before = poisoned(TINY, dtype)
    given = inputs(TINY, torch.bfloat16, tokens_count=len(slots))
    after = written(given, before, device if run is write_latents_kernel else "cpu", slots=slots, run=run)
    assert torch.equal(as_bytes(after), as_bytes(before))


def test_numbers_that_are_not_finite_do_not_become_finite_ones(device):
    given = inputs(TINY, torch.bfloat16)
    given[0][0, 3] = float("nan")
    packed = written(given, poisoned(TINY, torch.uint8), device)
    assert unpack_latents_reference(packed, 24)[SLOTS[0], :24].isnan().all()
    assert unpack_latents_reference(packed, 24)[SLOTS[2:]].isfinite().all()


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_the_operation_writes_as_its_reference(dtype, forced, device):
    given = inputs(TINY, torch.bfloat16)
    given[0][:, :24] = given[0][:, :24].sign()
    expected = written(given, poisoned(TINY, dtype), "cpu", run=write_latents_reference)
    with kernels_forced() if forced and device.type == "cpu" else nullcontext():
        out = written(given, poisoned(TINY, dtype), device if forced else "cpu", run=write_latents)
    if dtype == torch.uint8:
        expected, out = (unpack_latents_reference(part[SLOTS[2:]], 24) for part in (expected, out))
    assert torch.allclose(out.float(), expected.float(), rtol=2**-6, atol=2**-7, equal_nan=True)


def test_rows_that_do_not_fit_are_refused():
    given = inputs(TINY, torch.bfloat16)
    with pytest.raises(ValueError, match=r"give \[44\]"):
        written(given, poisoned(V3, torch.uint8), "cpu", run=write_latents)
    with pytest.raises(ValueError, match="slots"):
        written(given, poisoned(TINY, torch.uint8), "cpu", slots=SLOTS[1:], run=write_latents)
