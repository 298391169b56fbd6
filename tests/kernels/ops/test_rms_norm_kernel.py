"""The norm's kernel against its reference in float64: ragged, empty and strided rows, nothing read beyond."""

import pytest
import torch

from kernels.ops.rms_norm import rms_norm_reference
from kernels.ops.rms_norm_kernel import rms_norm_kernel

EPS = 1e-6
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # of the greatest number of a row


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 7168), (3, 512), (5, 100), (0, 64)], ids=str)
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
