"""FP8 products against float64: edges of all kinds, nothing read beyond, a row's bits in any company."""

import pytest
import torch

from kernels.ops import linear_fp8_kernel as kernel_module
from kernels.ops.backend import IS_INTERPRETED, kernels_forced
from kernels.ops.linear_fp8 import Fp8Weight, linear_fp8, linear_fp8_of, linear_fp8_reference
from kernels.ops.linear_fp8_kernel import linear_fp8_kernel, parts_of, tile_of
from kernels.ops.quantize import dequantize_blocks, quantize_rows

IN_PARTS, OUT_OF_PARTS = 1536, 72  # a product whose sums are cut into two parts

# Of the sum of a product's absolute terms: a GPU adds 32 terms of FP8 at a time with 14 bits, a CPU with 24.
TOLERANCE = {"cuda": 2**-9, "cpu": 2**-20}
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def operands(rows_count: int, in_count: int, out_count: int) -> tuple[torch.Tensor, ...]:
    """FP8 rows and an FP8 weight with their scales, random."""
    weight = Fp8Weight.of(torch.randn(out_count, in_count) * torch.rand(out_count, 1))
    return *quantize_rows(torch.randn(rows_count, in_count)), weight.weight, weight.scales


def assert_product(out: torch.Tensor, hidden, hidden_scales, weight, weight_scales) -> None:
    """What a kernel gave is the product in float64, as near as the type and the chip allow."""
    left = dequantize_blocks(hidden, hidden_scales, (1, 128)).double()
    right = dequantize_blocks(weight, weight_scales).double().t()
    product, terms = left @ right, left.abs() @ right.abs()
    error = (out.cpu().double() - product).abs()
    allowed = terms * TOLERANCE[out.device.type] + product.abs() * ROUNDING[out.dtype]
    assert (error <= allowed).all(), (error - allowed).max()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 100, 100),
        (3, 256, 576),
        (20, 300, 130),
        (64, 200, 8),
        (130, 384, 144),
        (3, IN_PARTS, OUT_OF_PARTS),
    ],
    ids=str,
)
def test_products_are_those_of_float64(sizes, dtype, device):
    parts = operands(*sizes)
    out = linear_fp8_kernel(*(part.to(device) for part in parts), dtype)
    assert out.dtype == dtype and out.shape == (sizes[0], sizes[2])
    assert_product(out, *parts)


@pytest.mark.parametrize("in_count", [300, IN_PARTS])
@pytest.mark.parametrize("rows_count", [2, 20, 64, 130])
def test_small_whole_numbers_are_exact_on_any_device(rows_count, in_count, device):
    """Sums of 128 terms are 2**11 at most, for which a GPU's 14 bits are enough."""
    hidden, weight = torch.randint(-4, 5, (rows_count, in_count)), torch.randint(-4, 5, (140, in_count))
    blocks_count = -(-in_count // 128)
    narrow = [numbers.to(torch.float8_e4m3fn) for numbers in (hidden.float(), weight.float())]
    parts = narrow[0], torch.ones(rows_count, blocks_count), narrow[1], torch.ones(2, blocks_count)
    out = linear_fp8_kernel(*(part.to(device) for part in parts), torch.float32)
    assert torch.equal(out.cpu(), (hidden @ weight.t()).float())


def test_other_numbers_of_rows_compile_nothing_anew():
    options = kernel_module._multiply.kwargs if IS_INTERPRETED else vars(kernel_module._multiply)
    assert "rows_count" in options["do_not_specialize"]


def test_more_tiles_than_a_group_are_each_computed_once(device):
    parts = operands(1100, 32, 260)
    assert_product(linear_fp8_kernel(*(part.to(device) for part in parts), torch.float32), *parts)


def test_no_rows_make_no_rows(device):
    for in_count in (128, IN_PARTS):
        parts = operands(0, in_count, OUT_OF_PARTS)
        out = linear_fp8_kernel(*(part.to(device) for part in parts), torch.bfloat16)
        assert out.shape == (0, OUT_OF_PARTS)


def test_a_row_has_the_same_bits_alone_and_in_any_company(device):
    rows_count = 140
    parts = operands(rows_count, IN_PARTS, OUT_OF_PARTS)
    if device.type == "cpu":  # here the tile tells in which order a product adds, unless in whole numbers
        for numbers in (parts[0], parts[2]):
            numbers.copy_(torch.randint(-4, 5, numbers.shape))
    hidden, scales, *weight = (part.to(device) for part in parts)
    assert parts_of(OUT_OF_PARTS, IN_PARTS) == 2
    whole = linear_fp8_kernel(hidden, scales, *weight, torch.float32)
    tiles = {tile_of(rows_count)}
    for some in (slice(0, 1), slice(139, 140), slice(3, 19), slice(60, 85), slice(1, 101)):
        tiles.add(tile_of(some.stop - some.start))
        assert torch.equal(linear_fp8_kernel(hidden[some], scales[some], *weight, torch.float32), whole[some])
    assert len(tiles) == 4


def test_parts_have_the_same_bits_with_programs_of_their_own_and_without(monkeypatch, device):
    parts = [part.to(device) for part in operands(5, IN_PARTS, OUT_OF_PARTS)]
    apart = linear_fp8_kernel(*parts, torch.float32)
    monkeypatch.setattr(kernel_module, "PARTIAL_NUMBERS_MAX", 0)
    assert torch.equal(linear_fp8_kernel(*parts, torch.float32), apart)


@pytest.mark.parametrize(
    ("sizes", "parts_count"),
    [((7168, 2112), 8), ((1536, 24576), 1), ((16384, 7168), 4), ((7168, 36864), 1), ((128, 128), 1)],
)
def test_a_sum_is_cut_where_its_outputs_are_too_few_for_the_chip(sizes, parts_count):
    assert parts_of(sizes[1], sizes[0]) == parts_count
    assert -(-sizes[0] // 128) % parts_count == 0


@pytest.mark.parametrize("rows_count", [3, 70])
def test_what_lies_beyond_rows_and_weights_is_not_read(rows_count, device):
    parts = operands(rows_count, 200, 130)
    wider = []
    for part in parts:
        wide = torch.full((part.shape[0] + 3, part.shape[1] + 56), float("nan")).to(part.dtype).to(device)
        wide[: part.shape[0], : part.shape[1]] = part.to(device)
        wider.append(wide[: part.shape[0], : part.shape[1]])
    assert_product(linear_fp8_kernel(*wider, torch.float32), *parts)


def test_zeros_huge_and_tiny_numbers_keep_their_size(device):
    weight = Fp8Weight.of(torch.randn(40, 256))
    hidden, scales = quantize_rows(torch.randn(3, 256) * torch.tensor([[0.0], [1e34], [1e-34]]))
    parts = hidden, scales, weight.weight, weight.scales
    out = linear_fp8_kernel(*(part.to(device) for part in parts), torch.float32)
    assert (out[0] == 0).all()
    assert_product(out, *parts)


def test_what_is_no_number_stays_in_its_row(device):
    hidden, scales, *weight = operands(4, 256, 130)
    scales[2, 1] = float("nan")
    out = linear_fp8_kernel(*(part.to(device) for part in (hidden, scales, *weight)), torch.float32)
    assert out.isnan().all(dim=1).tolist() == out.isnan().any(dim=1).tolist() == [False, False, True, False]


def test_a_float_weight_and_rows_of_bfloat16_lose_what_fp8_loses():
    hidden, weight = torch.randn(5, 300).bfloat16(), torch.randn(130, 300)
    narrow = Fp8Weight.of(weight)
    assert narrow.weight.dtype == torch.float8_e4m3fn and narrow.scales.shape == (2, 3)
    out, expected = linear_fp8_of(hidden, narrow), hidden.float() @ weight.t()
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    parts = *quantize_rows(hidden), narrow.weight, narrow.scales
    assert torch.equal(out, linear_fp8_reference(*parts, torch.bfloat16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels do not take a CPU's tensors")
def test_where_kernels_are_at_home_the_whole_operation_runs_on_them(monkeypatch):
    hidden, weight = torch.randn(5, 300).bfloat16(), Fp8Weight.of(torch.randn(130, 300))
    plain = linear_fp8_of(hidden, weight)
    monkeypatch.setattr("kernels.ops.linear_fp8.linear_fp8_reference", None)
    with kernels_forced():
        assert torch.allclose(linear_fp8_of(hidden, weight).float(), plain.float(), rtol=2**-7)


@pytest.mark.parametrize(
    ("index", "wrong", "complaint"),
    [
        (0, torch.zeros(3, 256), "hidden is .* float8_e4m3fn"),
        (0, torch.zeros(256, 3).to(torch.float8_e4m3fn).t(), "hidden is .* side by side"),
        (1, torch.ones(3, 3), "scales of hidden are .* 1 x 128"),
        (3, torch.ones(1, 2), "scales of weight are .* 128 x 128"),
        (3, torch.ones(2, 2).double(), "scales of weight are .* float32"),
    ],
)
def test_what_does_not_fit_is_refused(index, wrong, complaint):
    parts = list(operands(3, 256, 130))
    parts[index] = wrong
    with pytest.raises(ValueError, match=complaint):
        linear_fp8(*parts, torch.float32)


def test_rows_and_a_weight_of_different_widths_are_refused():
    hidden, scales, *_ = operands(3, 256, 130)
    with pytest.raises(ValueError, match="does not fit rows"):
        linear_fp8(hidden, scales, *operands(1, 128, 130)[2:], torch.float32)
