"""FP8 blocks: scales at the right numbers, edges ragged, nothing lost that the format can hold."""

import pytest
import torch

from kernels.ops.fp8_sizes import scale_shape
from kernels.ops.quantize import dequantize_blocks, quantize_blocks

SHAPES = [(128, 128), (256, 384), (576, 130), (64, 128), (1, 1), (129, 257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_blocks_equal_a_loop_over_numbers(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(scale_shape(*shape, (128, 128)), generator=generator) + 0.1
    result = dequantize_blocks(weight, scale_inv)
    rows, columns = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    assert torch.equal(result, weight.float() * scale_inv[rows // 128, columns // 128])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantising_loses_at_most_half_a_step_of_three_bits(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    quantised, scale_inv = quantize_blocks(weight, (128, 128))
    assert quantised.dtype == torch.float8_e4m3fn
    assert scale_inv.shape == scale_shape(*shape, (128, 128))
    error = (dequantize_blocks(quantised, scale_inv) - weight).abs()
    # Below 2^-6 of the scaled range, steps no longer shrink with the number: 2^-9, so half of that is lost.
    smallest_step = scale_inv.max() * 2**-9
    assert (error <= torch.maximum(weight.abs() / 16, smallest_step / 2) * 1.001).all()


def test_each_block_has_its_own_scale():
    weight = torch.ones(256, 256)
    weight[:128, 128:] = 1000.0
    weight[128:, :128] = 0.0
    quantised, scale_inv = quantize_blocks(weight, (128, 128))
    assert torch.allclose(scale_inv * 448, torch.tensor([[1.0, 1000.0], [448.0, 1.0]]))
    assert torch.allclose(dequantize_blocks(quantised, scale_inv), weight)


def test_blocks_need_not_be_square():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    quantised, scale_inv = quantize_blocks(weight, (1, 4))
    assert scale_inv.shape == (5, 2)
    assert torch.allclose(dequantize_blocks(quantised, scale_inv, (1, 4)), weight, rtol=0.07, atol=0.005)


def test_the_largest_number_stays_finite():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 4096, generator=generator) * torch.logspace(-30, 30, 4096)
    quantised, _ = quantize_blocks(weight, (128, 1))
    assert quantised.float().isfinite().all()
    assert (quantised.float().abs().amax(dim=0) == 448).all()
    for tiny in (1e-42, 1e-43):
        underflowing, scale_inv = quantize_blocks(torch.tensor([[tiny, 0.0]]), (128, 128))
        assert underflowing.float().isfinite().all() and scale_inv > 0


def test_the_product_is_rounded_once_to_the_wanted_dtype():
    weight = torch.tensor([[1.125]]).to(torch.float8_e4m3fn)
    result = dequantize_blocks(weight, torch.tensor([[1.0 + 2**-9]]), dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert result.item() == torch.tensor(1.125 * (1.0 + 2**-9)).bfloat16().item()


@pytest.mark.parametrize("scales", [(1, 1), (2, 2), (1, 3), (2,)])
def test_scales_that_do_not_fit_are_refused(scales):
    with pytest.raises(ValueError, match=r"scale_inv is .* one scale for each block"):
        dequantize_blocks(torch.zeros(130, 100).to(torch.float8_e4m3fn), torch.ones(scales))
