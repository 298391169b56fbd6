"""Compiled loops: as exact as float32 allows, a row's bits alone and in company, NaN never hidden."""

import numpy as np
import pytest
import torch

from kernels.ops.compiled import add_four_products, add_product, add_two_products, exp_each
from kernels.ops.expert_mlp import GatedWeights, gated_mlp
from kernels.ops.linear import linear_by_head, linear_by_head_reference, packed_by_head
from kernels.ops.mla_decode import mla_decode

NAN = float("nan")


def test_exponentials_are_exact_to_the_last_bits():
    exponents = np.concatenate([np.linspace(-87, 88, 100_003), [0, -0.0]]).astype(np.float32)
    powers = exponents.copy()
    exp_each(powers)
    errors = np.abs(powers / np.exp(exponents.astype(np.float64)) - 1)
    assert errors.max() < 2**-23
    assert (powers[-2:] == 1).all()


def test_exponentials_beyond_float32_are_next_to_nothing_or_infinite_and_nan_stays_nan():
    powers = np.array([-np.inf, -1000, 1000, np.inf, NAN, 1], np.float32)
    exp_each(powers)
    assert (powers[:2] < 1e-37).all() and (powers[2:4] == np.inf).all()
    assert np.isnan(powers[4]) and powers[5] == pytest.approx(np.e)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 512), (7, 33), (1, 5), (4, 16)])
def test_products_of_rows_together_have_the_bits_of_each_alone(inputs, outputs):
    random = np.random.default_rng(inputs)
    rows, begun = (random.standard_normal((4, size), np.float32) for size in (inputs, outputs))
    matrix = random.standard_normal((inputs, outputs), np.float32)
    alone, by_two, by_four = begun.copy(), begun.copy(), begun.copy()
    for row, out in zip(rows, alone, strict=True):
        add_product(row, matrix, out)
    add_two_products(rows[0], rows[1], matrix, by_two[0], by_two[1])
    add_four_products(tuple(rows), matrix, tuple(by_four))
    assert np.array_equal(by_two[:2], alone[:2])
    assert np.array_equal(by_four, alone)
    assert np.allclose(alone, begun + rows @ matrix, atol=1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), [(512, 64), (64, 512), (33, 7), (7, 33), (16, 16)])
def test_products_by_head_are_theirs_however_the_weight_lies(outputs, inputs):
    torch.manual_seed(outputs)
    hidden, weight = torch.randn(9, 3, inputs), torch.randn(3, outputs, inputs)
    expected = linear_by_head_reference(hidden, weight)
    apart = torch.randn(3, outputs + 1, inputs)[:, 1:].copy_(weight)
    for laid in (weight, apart, packed_by_head(weight)):
        out = linear_by_head(hidden, laid)
        assert torch.allclose(out, expected, atol=1e-4)
        for count in (1, 2, 4, 5):
            assert torch.equal(linear_by_head(hidden[-count:], laid), out[-count:])


def test_few_inputs_lie_together_and_bfloat16_stays_as_it_is():
    wide = packed_by_head(torch.randn(2, 8, 4))
    assert wide.stride() == (32, 1, 8)
    assert packed_by_head(torch.randn(2, 4, 8)).is_contiguous()
    assert packed_by_head(torch.randn(2, 8, 4, dtype=torch.bfloat16)).is_contiguous()


def test_attention_to_what_is_no_number_is_none():
    queries, latents = torch.randn(2, 5, 24), torch.randn(4, 64, 24)
    queries[1, 3, 0] = NAN
    pages, lengths = torch.tensor([[0, 1], [2, 3]]).int(), torch.tensor([70, 3]).int()
    attended = mla_decode(queries, latents, pages, lengths, 16, 0.3)
    assert attended[1, 3].isnan().all()
    attended[1, 3] = 0
    assert attended.isfinite().all()


def test_one_latent_that_is_no_number_is_felt_by_all_that_see_it():
    queries, latents = torch.randn(2, 4, 24), torch.randn(4, 64, 24)
    latents[0, 37, 20] = NAN
    pages, lengths = torch.tensor([[0, 1], [0, 1]]).int(), torch.tensor([70, 37]).int()
    attended = mla_decode(queries, latents, pages, lengths, 16, 0.3)
    assert attended[0].isnan().all() and attended[1].isfinite().all()


def test_experts_of_what_is_no_number_give_none():
    weights = GatedWeights.of(torch.randn(8, 8), torch.randn(8, 4))
    assert weights.are_small
    hidden = torch.randn(3, 8)
    hidden[1] = NAN
    out = gated_mlp(hidden, weights)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_gates_far_from_zero_shut_or_open():
    gate_up = torch.cat([torch.full((4, 8), 1000.0), torch.ones(4, 8)])
    weights = GatedWeights.of(gate_up, torch.ones(8, 4))
    out = gated_mlp(torch.stack([torch.ones(8), -torch.ones(8), torch.full((8,), -1e34)]), weights)
    assert torch.allclose(out[0], torch.tensor(4 * 8000.0 * 8))
    assert (out[1:] == 0).all()
