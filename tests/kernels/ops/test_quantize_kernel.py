"""Quantised rows: the kernel has the bits of the reference, whatever the numbers and the rows' memory."""

import pytest
import torch

from kernels.ops.backend import kernels_forced
from kernels.ops.quantize import dequantize_blocks, quantize_rows, quantize_rows_reference
from kernels.ops.quantize_kernel import quantize_rows_kernel


def assert_same_bits(hidden: torch.Tensor, device: torch.device) -> None:
    """The kernel on the device and the reference on the CPU give the same codes and scales."""
    quantised, scales = quantize_rows_kernel(hidden.to(device))
    expected, expected_scales = quantize_rows_reference(hidden)
    assert quantised.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert torch.equal(quantised.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales.cpu(), expected_scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 7168), (3, 576), (5, 100), (1, 1), (0, 256)], ids=str)
def test_codes_and_scales_are_those_of_the_reference(shape, dtype, device):
    assert_same_bits(torch.randn(shape).to(dtype), device)


def test_zeros_huge_tiny_and_infinitely_uneven_numbers_are_those_of_the_reference(device):
    hidden = torch.randn(6, 256) * torch.tensor([0.0, 1e38, 1e-38, 1e-43, 1.0, 1e30])[:, None]
    hidden[4] *= torch.logspace(-30, 30, 256)
    hidden[5, 3:] = 0.0
    assert_same_bits(hidden, device)


def test_every_code_of_fp8_and_every_half_way_between_two_is_rounded_as_in_torch(device):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[:-1] + codes[1:]) / 2
    numbers = torch.cat([codes, halves, -codes, -halves, torch.nextafter(halves, codes[1:])])
    rows = numbers.split(127)
    hidden = torch.zeros(len(rows), 128)
    for row, part in zip(hidden, rows, strict=True):
        row[: len(part)] = part
    hidden[:, -1] = 448.0  # a scale of one
    assert_same_bits(hidden, device)


def test_rows_of_wider_rows_are_read_no_further(device):
    wide = torch.full((4, 512), float("nan"))
    wide[:, :200] = torch.randn(4, 200)
    assert_same_bits(wide[:, :200], device)
    quantised, scales = quantize_rows_kernel(wide.to(device)[:, :200])
    assert quantised.is_contiguous() and scales.isfinite().all()


def test_what_is_no_number_stays_none(device):
    hidden = torch.ones(2, 128)
    hidden[1, 5] = float("nan")
    quantised, _ = quantize_rows_kernel(hidden.to(device))
    assert quantised.cpu().float().isnan().nonzero().tolist() == [[1, 5]]
    assert_same_bits(hidden.nan_to_num(), device)


def test_a_row_has_the_same_bits_alone_and_in_company(device):
    hidden = torch.randn(7, 300).bfloat16().to(device)
    quantised, scales = quantize_rows_kernel(hidden)
    for row in range(7):
        alone, scale_alone = quantize_rows_kernel(hidden[row : row + 1])
        assert torch.equal(alone[0].view(torch.uint8), quantised[row].view(torch.uint8))
        assert torch.equal(scale_alone[0], scales[row])


def test_the_public_operation_takes_the_kernel_on_a_gpu_and_the_reference_elsewhere(monkeypatch):
    hidden = torch.randn(3, 130)
    plain = quantize_rows(hidden)
    assert torch.allclose(dequantize_blocks(*plain, (1, 128)), hidden, rtol=0.07, atol=0.01)
    monkeypatch.setattr("kernels.ops.quantize.quantize_rows_kernel", lambda tensor: ("kernel", tensor))
    if not torch.cuda.is_available():
        with kernels_forced():
            assert quantize_rows(hidden) == ("kernel", hidden)


def test_what_is_not_rows_is_refused():
    with pytest.raises(ValueError, match=r"rows of numbers side by side"):
        quantize_rows(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"rows of numbers side by side"):
        quantize_rows(torch.zeros(4, 3).t())
