"""Products: right, and the same for a row whatever is computed beside it."""

import pytest
import torch

from kernels.ops.linear import linear, linear_by_head, linear_by_head_reference, packed, rows_missing
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

SHAPES = [(128, 640), (64, 768), (512, 256), (128, 16), (100, 36), (2048, 96), (7168, 64)]  # [in, out]
SHAPES_BY_HEAD = [(4, 512, 32), (4, 32, 512), (16, 64, 128), (2, 24, 16)]  # [heads, out, in]
KEPT, KEPT_NAMES = (lambda weight: weight, packed), ("plain", "packed")
PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, small enough that products stay near 1."""
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", KEPT, ids=KEPT_NAMES)
def test_a_row_keeps_its_bits_in_any_batch(kept, shape, dtype, threads_count):
    size_in, size_out = shape
    hidden, weight = torch.randn(ROWS_COUNT, size_in).to(dtype), kept(drawn(size_out, size_in, dtype=dtype))
    with threads(threads_count):
        assert_rows_keep_their_bits(lambda some: linear(hidden[some], weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", KEPT, ids=KEPT_NAMES)
def test_a_row_keeps_its_bits_with_a_bias(kept, dtype):
    hidden, weight, bias = (
        torch.randn(ROWS_COUNT, 96).to(dtype),
        kept(drawn(48, 96, dtype=dtype)),
        torch.randn(48).to(dtype),
    )
    assert_rows_keep_their_bits(lambda some: linear(hidden[some], weight, bias))


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_BY_HEAD, ids=str)
def test_a_row_keeps_its_bits_head_by_head(shape, dtype, threads_count):
    heads_count, _, size_in = shape
    wider = torch.randn(ROWS_COUNT, heads_count, size_in + 64).to(dtype)
    weight = (torch.randn(shape) / size_in**0.5).to(dtype)
    with threads(threads_count):
        assert_rows_keep_their_bits(lambda some: linear_by_head(wider[some][..., :size_in], weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_count", [1, 3, 4, 17, 64])
@pytest.mark.parametrize("kept", KEPT, ids=KEPT_NAMES)
def test_bits_do_not_depend_on_the_number_of_threads(kept, rows_count, dtype):
    hidden, weight = torch.randn(rows_count, 512).to(dtype), kept(drawn(640, 512, dtype=dtype))
    results = []
    for threads_count in THREADS:
        with threads(threads_count):
            results.append(linear(hidden, weight))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_count", [1, 3, 4, 33])
@pytest.mark.parametrize("kept", KEPT, ids=KEPT_NAMES)
def test_products_are_right(kept, rows_count, dtype):
    hidden, weight, bias = torch.randn(rows_count, 256), torch.randn(48, 256) / 16, torch.randn(48)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    exact = hidden.double() @ weight.double().T + bias.double()
    wider = torch.randn(rows_count, 300).to(dtype)
    wider[:, 40:296] = hidden  # rows may lie apart
    error = (linear(wider[:, 40:296], kept(weight), bias).double() - exact).abs().max()
    assert error <= PRODUCT_TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_count", [1, 4, 5])
def test_products_head_by_head_are_right(rows_count, dtype):
    hidden, weight = torch.randn(rows_count, 3, 64).to(dtype), (torch.randn(3, 32, 64) / 8).to(dtype)
    exact = torch.stack([hidden[:, head].double() @ weight[head].double().T for head in range(3)], dim=1)
    for product in (linear_by_head, linear_by_head_reference):
        error = (product(hidden, weight).double() - exact).abs().max()
        assert error <= PRODUCT_TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("kept", KEPT, ids=KEPT_NAMES)
def test_no_rows_give_no_rows(kept):
    assert linear(torch.empty(0, 8), kept(torch.randn(4, 8))).shape == (0, 4)


def test_only_a_cpu_needs_more_rows():
    assert rows_missing(1, torch.empty(4, 8, device="meta")) == 0
    assert rows_missing(1, torch.empty(4, 8)) == 3
    assert rows_missing(1, packed(torch.randn(4, 8))) == 1


def test_a_machine_without_onednn_keeps_weights_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight = torch.randn(4, 8)
    assert packed(weight) is weight
