"""Plain products against float64: edges of all kinds, nothing read beyond, a row's bits in any company."""

import pytest
import torch

from kernels.ops import linear_kernel as kernel_module
from kernels.ops.backend import kernels_forced
from kernels.ops.linear import linear, linear_by_head, linear_reference, packed
from kernels.ops.linear_kernel import (
    linear_by_head_kernel,
    linear_kernel,
    parts_are_apart,
    parts_of,
    tile_of,
)

DTYPES = (torch.float32, torch.bfloat16)
OUT_OF_PARTS = 72
IN_OF_PARTS = {torch.float32: 512, torch.bfloat16: 512}  # products whose sums are cut into two parts

# Of the sum of a product's absolute terms, and of the result: sums are float32, then rounded once.
SUM_TOLERANCE = 2**-18
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers of a type."""
    return torch.randn(shape).to(dtype)


def whole_numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, whose sums are the same in any order."""
    return torch.randint(-4, 5, shape).to(dtype)


def assert_product(out: torch.Tensor, hidden, weight, bias=None) -> None:
    """What a kernel gave of `[..., rows, in]` is the product in float64, as near as its type allows."""
    left, right = hidden.double(), weight.double().transpose(-1, -2)
    product, terms = left @ right, left.abs() @ right.abs()
    if bias is not None:
        product, terms = product + bias.double(), terms + bias.double().abs()
    error = (out.cpu().double() - product).abs()
    allowed = terms * SUM_TOLERANCE + product.abs() * ROUNDING[out.dtype]
    assert (error <= allowed).all(), (error - allowed).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["bare", "biased"])
@pytest.mark.parametrize(
    "sizes", [(1, 100, 100), (3, 256, 300), (20, 90, 130), (64, 128, 8), (130, 96, 144)], ids=str
)
def test_products_are_those_of_float64(sizes, has_bias, dtype, device):
    rows_count, in_count, out_count = sizes
    parts = [normal(rows_count, in_count, dtype=dtype), normal(out_count, in_count, dtype=dtype)]
    if has_bias:
        parts.append(normal(out_count, dtype=dtype))
    out = linear_kernel(*(part.to(device) for part in parts))
    assert out.dtype == dtype and out.shape == (rows_count, out_count)
    assert_product(out, *parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_count", [1, 5, 70])
def test_sums_cut_into_parts_are_those_of_float64(rows_count, dtype, device):
    in_count = IN_OF_PARTS[dtype]
    parts = [normal(*shape, dtype=dtype) for shape in ((rows_count, in_count), (OUT_OF_PARTS, in_count))]
    parts.append(normal(OUT_OF_PARTS, dtype=dtype))
    assert parts_of(OUT_OF_PARTS, in_count, dtype) == 2
    assert_product(linear_kernel(*(part.to(device) for part in parts)), *parts)


@pytest.mark.parametrize("sizes", [(1, 512, 72), (5, 100, 72), (70, 512, 72)], ids=str)
def test_products_of_bfloat16_may_stay_float32(sizes, device):
    rows_count, in_count, out_count = sizes
    shapes = (rows_count, in_count), (out_count, in_count), (out_count,)
    parts = [normal(*shape, dtype=torch.bfloat16) for shape in shapes]
    out = linear_kernel(*(part.to(device) for part in parts), dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_product(out, *parts)
    assert_product(linear_reference(*parts, dtype=torch.float32), *parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 3, 100, 40), (5, 2, 64, 130), (70, 2, 24, 16)], ids=str)
def test_products_head_by_head_are_those_of_float64(sizes, dtype, device):
    rows_count, heads_count, in_count, out_count = sizes
    hidden = normal(rows_count, heads_count, in_count + 8, dtype=dtype)[..., :in_count]
    weight = normal(heads_count, out_count, in_count, dtype=dtype)
    out = linear_by_head_kernel(hidden.to(device), weight.to(device))
    assert out.dtype == dtype and out.shape == (rows_count, heads_count, out_count) and out.is_contiguous()
    assert_product(out.transpose(0, 1), hidden.transpose(0, 1), weight)


def test_the_largest_tiles_are_right_and_each_is_computed_once(monkeypatch, device):
    monkeypatch.setattr(kernel_module, "PROGRAMS_WANTED", 2)
    rows_count, out_count = 2400, 150
    parts = [normal(*shape, dtype=torch.bfloat16) for shape in ((rows_count, 40), (out_count, 40))]
    assert tile_of(rows_count, out_count, 1, torch.bfloat16).rows * kernel_module.TILE_GROUP < rows_count
    assert_product(linear_kernel(*(part.to(device) for part in parts)), *parts)


def test_no_rows_make_no_rows(device):
    for dtype, in_count in IN_OF_PARTS.items():
        weight = normal(OUT_OF_PARTS, in_count, dtype=dtype).to(device)
        assert linear_kernel(weight[:0], weight).shape == (0, OUT_OF_PARTS)
    assert linear_by_head_kernel(
        torch.empty(0, 2, 8, device=device), weight.new_empty(2, 4, 8).float()
    ).shape == (
        0,
        2,
        4,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_company(dtype, device):
    rows_count, in_count = 140, IN_OF_PARTS[dtype]
    # in the interpreter the tile tells in which order a product adds, unless in whole numbers
    draw = whole_numbers if device.type == "cpu" else normal
    hidden = draw(rows_count, in_count, dtype=dtype).to(device)
    weight = draw(OUT_OF_PARTS, in_count, dtype=dtype).to(device)
    bias = normal(OUT_OF_PARTS, dtype=dtype).to(device)
    assert_same_in_company(lambda some: linear_kernel(hidden[some], weight, bias), rows_count)
    kinds = {tile_of(count, OUT_OF_PARTS, 2, dtype) for count in (1, 16, 25, 60, rows_count)}
    assert len(kinds) == (2 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_head_by_head_alone_and_in_any_company(dtype, device):
    draw = whole_numbers if device.type == "cpu" else normal
    hidden = draw(140, 2, 100, dtype=dtype).to(device)[..., :72]
    weight = draw(2, 40, 72, dtype=dtype).to(device)
    assert_same_in_company(lambda some: linear_by_head_kernel(hidden[some], weight), 140)


def assert_same_in_company(compute, rows_count: int) -> None:
    """`compute` gives the results of some rows: each what it is among all."""
    whole = compute(slice(0, rows_count))
    for begin, end in ((0, 1), (rows_count - 1, rows_count), (3, 19), (60, 85), (1, 61), (0, 100)):
        assert torch.equal(compute(slice(begin, end)), whole[begin:end]), (begin, end)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the order within a tensor core is a GPU's")
@pytest.mark.parametrize("sizes", [(7168, 2112), (1536, 24576), (512, 32768)], ids=str)
def test_rows_of_a_large_model_have_the_same_bits_in_tiles_of_every_size(sizes, device):
    in_count, out_count = sizes
    hidden = torch.randn(4096, in_count, device=device).bfloat16()
    weight = torch.randn(out_count, in_count, device=device).bfloat16()
    whole = linear_kernel(hidden, weight)
    for count in (1, 16, 32, 64, 128, 300, 1024):
        assert torch.equal(linear_kernel(hidden[-count:], weight), whole[-count:]), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_have_the_same_bits_with_programs_of_their_own_and_without(dtype, monkeypatch, device):
    in_count = IN_OF_PARTS[dtype]
    shapes = (5, in_count), (OUT_OF_PARTS, in_count), (OUT_OF_PARTS,)
    parts = [normal(*shape, dtype=dtype).to(device) for shape in shapes]
    tile = tile_of(5, OUT_OF_PARTS, 2, dtype)
    assert parts_are_apart(5, OUT_OF_PARTS, 2, tile)
    apart = linear_kernel(*parts)
    monkeypatch.setattr(kernel_module, "PARTIAL_NUMBERS_MAX", 0)
    assert not parts_are_apart(5, OUT_OF_PARTS, 2, tile)
    assert torch.equal(linear_kernel(*parts), apart)


@pytest.mark.parametrize(
    ("sizes", "dtype", "parts_count"),
    [
        ((7168, 2112), torch.bfloat16, 8),
        ((7168, 4096), torch.bfloat16, 8),
        ((2048, 7168), torch.bfloat16, 2),
        ((16384, 7168), torch.bfloat16, 4),
        ((512, 32768), torch.bfloat16, 1),
        ((7168, 129280), torch.bfloat16, 1),
        ((128, 128), torch.bfloat16, 1),
        ((7168, 256), torch.float32, 28),
        ((7168, 256), torch.bfloat16, 28),
        ((7168, 512), torch.bfloat16, 28),
        ((7168, 576), torch.bfloat16, 8),
    ],
)
def test_a_sum_is_cut_where_its_outputs_are_too_few_for_the_chip(sizes, dtype, parts_count):
    assert parts_of(sizes[1], sizes[0], dtype) == parts_count
    assert -(-sizes[0] // kernel_module.cut_of(dtype).step) % parts_count == 0


@pytest.mark.parametrize(
    ("rows_count", "out_count", "parts_count", "tile_rows", "are_apart"),
    [
        (1, 2112, 8, 16, True),
        (256, 2112, 8, 128, True),
        (4096, 2112, 8, 128, False),
        (256, 7168, 4, 128, True),
        (512, 7168, 4, 128, False),
        (128, 129280, 1, 128, False),
        (1024, 129280, 1, 256, False),
        (4096, 32768, 1, 256, False),
        (0, 2112, 8, 16, True),
    ],
)
def test_tiles_are_as_large_as_rows_and_the_chip_let_them(
    rows_count, out_count, parts_count, tile_rows, are_apart
):
    tile = tile_of(rows_count, out_count, parts_count, torch.bfloat16)
    assert tile.rows == tile_rows
    assert parts_are_apart(rows_count, out_count, parts_count, tile) == are_apart


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_count", [3, 70])
def test_what_lies_beyond_rows_and_weights_is_not_read(rows_count, dtype, device):
    parts = [normal(*shape, dtype=dtype) for shape in ((rows_count, 100), (130, 100), (1, 130))]
    wider = []
    for part in parts:
        wide = torch.full((len(part) + 3, part.shape[1] + 28), float("nan"), dtype=dtype, device=device)
        wide[: len(part), : part.shape[1]] = part.to(device)
        wider.append(wide[: len(part), : part.shape[1]])
    assert_product(linear_kernel(*wider[:2], wider[2][0]), *parts[:2], parts[2][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_may_lie_column_by_column(dtype, device):
    hidden, weight = normal(3, 40, dtype=dtype), normal(24, 40, dtype=dtype)
    turned = [part.to(device).t().contiguous().t() for part in (hidden, weight)]
    assert_product(linear_kernel(*turned), hidden, weight)


def test_what_is_no_number_stays_in_its_row(device):
    for dtype, in_count in IN_OF_PARTS.items():
        hidden, weight = normal(4, in_count, dtype=dtype), normal(OUT_OF_PARTS, in_count, dtype=dtype)
        hidden[2, 7], hidden[3, 9] = float("nan"), float("inf")
        out = linear_kernel(hidden.to(device), weight.to(device))
        assert out.isfinite().all(dim=1).tolist() == out.isfinite().any(dim=1).tolist()
        assert out.isnan().all(dim=1).tolist() == [False, False, True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels do not take a CPU's tensors")
def test_where_kernels_are_at_home_they_multiply_what_is_not_packed(monkeypatch):
    hidden, weight = torch.randn(3, 2, 40), torch.randn(2, 24, 40)
    plain, by_head = linear(hidden[:, 0], weight[0]), linear_by_head(hidden, weight)
    small = packed(weight[0])
    monkeypatch.setattr("kernels.ops.linear.linear_by_head_reference", None)
    with kernels_forced():
        assert torch.allclose(linear_by_head(hidden, weight), by_head, atol=1e-5)
        assert torch.allclose(linear(hidden[:, 0], small), plain, atol=1e-5)
        monkeypatch.setattr("kernels.ops.linear.linear_reference", None)
        assert torch.allclose(linear(hidden[:, 0], weight[0]), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(8, 5), None),
        (torch.zeros(8, 4).bfloat16(), None),
        (torch.zeros(8, 4), torch.zeros(1)),
        (torch.zeros(8), None),
    ],
)
def test_what_does_not_fit_is_refused(weight, bias):
    with pytest.raises(ValueError, match=r"do not fit \[3, 4\] of torch\.float32"):
        linear_kernel(torch.zeros(3, 4), weight, bias)


@pytest.mark.parametrize("shape", [(3, 8, 4), (2, 8, 5)])
def test_heads_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"do not fit \[3, 2, 4\]"):
        linear_by_head_kernel(torch.zeros(3, 2, 4), torch.zeros(shape))
