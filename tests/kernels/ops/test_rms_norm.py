"""The norm: its formula, in place and beside other columns, a row's the same in any batch."""

import pytest
import torch

from kernels.ops.rms_norm import rms_norm, rms_norm_reference
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

NORM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
EPS = 1e-3


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_its_formula(dtype, norm):
    hidden, weight = torch.randn(5, 72).to(dtype), torch.rand(72).to(dtype)
    wide = hidden.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    result = norm(hidden, weight, EPS)
    assert result.dtype == dtype and (result.double() - expected).abs().max() < NORM_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_columns_are_normed_where_they_stand(dtype):
    wide, weight = torch.randn(5, 100).to(dtype), torch.rand(72).to(dtype)
    expected, before = rms_norm(wide[:, 8:80].contiguous(), weight, EPS), wide.clone()
    rms_norm(wide[:, 8:80], weight, EPS, out=wide[:, 8:80])
    assert torch.equal(wide[:, 8:80], expected)
    assert torch.equal(wide[:, :8], before[:, :8]) and torch.equal(wide[:, 80:], before[:, 80:])


def test_no_rows_give_no_rows():
    assert rms_norm(torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [36, 512])
def test_a_row_keeps_its_bits_in_any_batch(size, dtype, threads_count):
    hidden, weight = torch.randn(ROWS_COUNT, size).to(dtype), torch.rand(size).to(dtype)
    with threads(threads_count):
        assert_rows_keep_their_bits(lambda some: rms_norm(hidden[some], weight, EPS))
