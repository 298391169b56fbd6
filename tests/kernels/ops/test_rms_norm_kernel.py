"""The norms' kernel against references in float64: ragged, empty and strided rows, nothing read beyond."""

import pytest
import torch

from kernels.ops.backend import kernels_forced
from kernels.ops.quantize import dequantize_blocks, quantize_rows
from kernels.ops.quantize_kernel import quantize_rows_kernel
from kernels.ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_quantize,
    add_rms_norm_quantize_reference,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_quantize,
    rms_norm_quantize_reference,
    rms_norm_reference,
)
from kernels.ops.rms_norm_kernel import (
    add_rms_norm_kernel,
    add_rms_norm_quantize_kernel,
    rms_norm_kernel,
    rms_norm_quantize_kernel,
)

EPS = 1e-6
SHAPES = [(1, 7168), (3, 512), (5, 100), (2, 576), (0, 64)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # of the greatest number of a row


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_reference(shape, dtype, device):
    hidden, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    out = rms_norm_kernel(hidden.to(device), weight.to(device), EPS).cpu()
    expected = rms_norm_reference(hidden.double(), weight.double(), EPS)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])


def test_part_of_a_wider_row_is_normed_in_place_and_its_rest_is_neither_read_nor_written(device):
    wide = torch.full((4, 96), float("nan"), device=device)
    wide[:, :64] = torch.randn(4, 64)
    part, weight = wide[:, :64], torch.randn(64)
    expected = rms_norm_reference(part.cpu(), weight, EPS)
    assert rms_norm_kernel(part, weight.to(device), EPS, out=part).data_ptr() == wide.data_ptr()
    assert torch.allclose(part.cpu(), expected, atol=1e-5)
    assert wide[:, 64:].isnan().all()


def residual_and_hidden(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A residual, what is added to it, and a weight."""
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_grows_by_one_rounding_and_its_norm_is_that_of_the_sum(shape, dtype, device):
    residual, hidden, weight = residual_and_hidden(shape, dtype)
    grown = residual.clone().to(device)
    out = add_rms_norm_kernel(hidden.to(device), grown, weight.to(device), EPS)
    assert torch.equal(grown.cpu(), residual + hidden)
    assert out.dtype == dtype
    assert torch.equal(out, rms_norm_kernel(grown, weight.to(device), EPS))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_launch_has_the_bits_of_the_launches_that_it_spares(shape, dtype, device):
    residual, hidden, weight = (part.to(device) for part in residual_and_hidden(shape, dtype))
    grown = residual.clone()
    one = add_rms_norm_quantize_kernel(hidden, grown, weight, EPS)
    assert torch.equal(grown, residual + hidden)
    two = rms_norm_quantize_kernel(grown, weight, EPS)
    three = quantize_rows_kernel(rms_norm_kernel(grown, weight, EPS))
    for codes, scales in (one, two):
        assert torch.equal(codes.view(torch.uint8), three[0].view(torch.uint8))
        assert torch.equal(scales, three[1])


def test_codes_are_those_of_the_reference_but_for_a_few_that_are_one_apart(device):
    hidden, _, weight = residual_and_hidden((2, 7168), torch.bfloat16)
    codes, scales = rms_norm_quantize_kernel(hidden.to(device), weight.to(device), EPS)
    expected, expected_scales = rms_norm_quantize_reference(hidden, weight, EPS)
    # a number near the middle of two of bfloat16 may fall to the other side, a block's largest among them
    assert torch.allclose(scales.cpu(), expected_scales, rtol=2**-7)
    apart = (codes.cpu().view(torch.int8).int() - expected.view(torch.int8).int()).abs()
    assert apart.max() <= 1 and apart.float().mean() <= 0.01


def test_a_norm_has_the_same_bits_alone_and_in_company(device):
    residual, hidden, weight = (part.to(device) for part in residual_and_hidden((9, 512), torch.bfloat16))
    alone = residual[4:5].clone()
    whole = add_rms_norm_quantize_kernel(hidden, residual, weight, EPS)
    codes, scales = add_rms_norm_quantize_kernel(hidden[4:5], alone, weight, EPS)
    assert torch.equal(alone, residual[4:5]) and torch.equal(scales, whole[1][4:5])
    assert torch.equal(codes.view(torch.uint8), whole[0][4:5].view(torch.uint8))


def test_rows_of_wider_rows_are_normed_and_added_to_no_further(device):
    wide = torch.full((2, 3, 256), float("nan"), device=device)
    wide[..., :200] = torch.randn(2, 3, 200)
    (hidden, residual), weight = wide[..., :200], torch.randn(200)
    total = (hidden + residual).cpu()
    codes, scales = add_rms_norm_quantize_kernel(hidden, residual, weight.to(device), EPS)
    assert torch.equal(residual.cpu(), total) and wide[..., 200:].isnan().all()
    expected = rms_norm_reference(total.double(), weight.double(), EPS)
    assert torch.allclose(
        dequantize_blocks(codes, scales, (1, 128)).cpu().double(), expected, rtol=0.07, atol=0.02
    )


def test_zeros_huge_and_tiny_rows_are_normed_as_in_float64(device):
    hidden = torch.randn(3, 256) * torch.tensor([[0.0], [1e17], [1e-17]])
    out = rms_norm_kernel(hidden.to(device), torch.ones(256, device=device), 1e-36).cpu()
    expected = rms_norm_reference(hidden.double(), torch.ones(256).double(), 1e-36)
    assert torch.allclose(out.double(), expected, rtol=1e-5)


def test_the_public_operations_are_one_chain_of_small_ones():
    residual, hidden, weight = residual_and_hidden((3, 200), torch.bfloat16)
    total = residual + hidden
    assert torch.equal(add_rms_norm(hidden, residual.clone(), weight, EPS), rms_norm(total, weight, EPS))
    codes, scales = quantize_rows(rms_norm(total, weight, EPS))
    for whole in (
        rms_norm_quantize(total, weight, EPS),
        add_rms_norm_quantize(hidden, residual, weight, EPS),
        rms_norm_quantize_reference(total, weight, EPS),
    ):
        assert torch.equal(whole[0].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(whole[1], scales)
    assert torch.equal(residual, total)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels do not take a CPU's tensors")
@pytest.mark.parametrize("reference", [add_rms_norm_reference, add_rms_norm_quantize_reference])
def test_where_kernels_are_at_home_they_give_what_the_references_give(reference):
    operation = {add_rms_norm_reference: add_rms_norm}.get(reference, add_rms_norm_quantize)
    residual, hidden, weight = residual_and_hidden((2, 300), torch.float32)
    expected = reference(hidden, residual.clone(), weight, EPS)
    with kernels_forced():
        given = operation(hidden, residual, weight, EPS)
    for part, wanted in zip(given, expected, strict=True):
        assert torch.allclose(part.float(), wanted.float(), rtol=0.13)  # one code of FP8


def test_a_residual_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"a residual of \[3, 8\] does not fit rows of \[2, 8\]"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(8), EPS)
