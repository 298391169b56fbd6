"""Latents as FP8: where each byte lies, what scales are, how much is lost, and that nothing else is."""

import pytest
import torch

from kernels.ops.fp8_sizes import packed_bytes, tiles_count
from kernels.ops.latent_format import (
    E4M3_MAX,
    SCALE_MIN,
    pack_latents_reference,
    power_of_two_above,
    unpack_latents_reference,
)

DIMS = [(512, 64), (24, 8), (132, 6)]
STEP = 2**-4  # between a number and the nearest of three bits, at most


@pytest.mark.parametrize(("dims", "size_bytes"), [((512, 64), 656), ((24, 8), 44), ((132, 6), 152)], ids=str)
def test_a_row_takes_so_many_bytes(dims, size_bytes):
    assert packed_bytes(*dims) == size_bytes
    assert pack_latents_reference(torch.randn(3, sum(dims)), dims[0]).shape == (3, size_bytes)


def test_codes_then_scales_then_the_rotated_key_in_bfloat16():
    latents = torch.zeros(1, 512 + 64)
    latents[0, 0], latents[0, 130] = 448.0, -3.0
    latents[0, 512:] = torch.arange(64) * 0.5
    packed = pack_latents_reference(latents, 512)[0]
    codes = packed[:512].view(torch.float8_e4m3fn).float()
    scales = packed[512:528].clone().view(torch.float32)
    assert scales.tolist() == [1.0, 2**-7, SCALE_MIN, SCALE_MIN]
    assert (codes[0], codes[130]) == (448.0, -384.0) and codes.count_nonzero() == 2
    assert torch.equal(packed[528:].clone().view(torch.bfloat16).float(), latents[0, 512:])


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_lose_no_more_than_three_bits_allow_and_keys_nothing(dims, dtype):
    value_dim = dims[0]
    latents = torch.randn(7, sum(dims)).bfloat16().to(dtype)
    packed = pack_latents_reference(latents, value_dim)
    back = unpack_latents_reference(packed, value_dim, dtype)
    assert back.dtype == dtype and back.shape == latents.shape
    assert torch.equal(back[:, value_dim:], latents[:, value_dim:])
    error = (back.float() - latents.float())[:, :value_dim].abs()
    greatest = latents[:, :value_dim].abs().amax(dim=1, keepdim=True).float()
    assert (error <= STEP * latents[:, :value_dim].abs().float() + greatest * 2 / E4M3_MAX * 2**-10).all()


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_what_was_packed_once_packs_to_the_same_numbers_again(dims):
    once = unpack_latents_reference(pack_latents_reference(torch.randn(5, sum(dims)), dims[0]), dims[0])
    again = unpack_latents_reference(pack_latents_reference(once, dims[0]), dims[0])
    assert torch.equal(once, again)


def test_scales_are_the_least_powers_of_two_that_hold_the_greatest_number():
    numbers = torch.cat([torch.rand(100).exp2() * 2.0 ** torch.randint(-60, 60, (100,)), torch.ones(1)])
    scales = power_of_two_above(numbers)
    assert torch.equal(scales.log2(), scales.log2().round())
    assert (scales >= numbers).all() and (scales / 2 < numbers).all()
    assert power_of_two_above(torch.tensor([0.0, 1e-40])).tolist() == [SCALE_MIN, SCALE_MIN]


def test_each_tile_has_a_scale_of_its_own():
    latents = torch.ones(1, 260 + 2)
    latents[0, 128:256], latents[0, 256:260] = 2.0**20, 2.0**-20
    packed = pack_latents_reference(latents, 260)
    scales = packed[0, 260 : 260 + 4 * tiles_count(260)].clone().view(torch.float32)
    assert tiles_count(260) == 3 and torch.equal(scales, torch.tensor([1.0, 2.0**20, 2.0**-20]) * 2**-8)
    assert torch.equal(unpack_latents_reference(packed, 260), latents)


def test_no_tokens_pack_to_no_rows():
    packed = pack_latents_reference(torch.empty(0, 32), 24)
    assert packed.shape == (0, 44) and unpack_latents_reference(packed, 24).shape == (0, 32)
