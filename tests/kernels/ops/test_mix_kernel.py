"""The mixture's kernel against sums in float64: any order, slots of nobody, nothing read beyond."""

from contextlib import nullcontext

import pytest
import torch

from kernels.ops.backend import kernels_forced
from kernels.ops.mix import mix, mix_placed, mix_placed_reference
from kernels.ops.mix_kernel import mix_kernel, places_kernel

TOLERANCE = 1e-5  # of outputs and weights near 1
CHOICES = 6


def poisoned(tokens_count: int, size: int, nobody: int, dtype: torch.dtype, device: torch.device):
    """Outputs, weights and places, with NaN where nothing may be read, and the mixture in float64."""
    slots_count = tokens_count * CHOICES
    wide = torch.full((slots_count + 2, size + 24), float("nan"), dtype=dtype)
    outputs, weights = wide[:, :size], torch.rand(tokens_count, CHOICES)
    places = torch.randperm(slots_count).int()
    unused = torch.randperm(slots_count)[:nobody]
    places[unused], weights.view(-1)[unused] = -1, float("nan")
    expected = torch.zeros(tokens_count, size, dtype=torch.float64)
    for slot in (places >= 0).nonzero().flatten().tolist():
        outputs[places[slot]] = torch.randn(size).to(dtype)
        weight = weights.view(-1)[slot].double()
        expected[slot // CHOICES] += weight * outputs[places[slot]].double()
    return wide.to(device)[:, :size], weights.to(device), places.to(device), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nobody", [0, 5])
@pytest.mark.parametrize("shape", [(1, 7168), (5, 1030), (3, 7), (0, 64)], ids=str)
def test_each_token_mixes_the_outputs_at_its_places(shape, nobody, dtype, device):
    outputs, weights, places, expected = poisoned(*shape, nobody, dtype, device)
    mixed = mix_kernel(outputs, weights, places).cpu()
    assert mixed.dtype == torch.float32 and mixed.shape == shape
    assert torch.allclose(mixed.double(), expected, atol=TOLERANCE, rtol=0)
    by_torch = mix_placed_reference(outputs, weights, places).cpu()
    assert torch.allclose(by_torch.double(), expected, atol=TOLERANCE, rtol=0)


def test_an_output_that_is_no_number_spoils_its_own_token_alone(device):
    outputs, weights, places, _ = poisoned(3, 40, 0, torch.float32, device)
    outputs[places[CHOICES].item()] = float("nan")
    mixed = mix_kernel(outputs, weights, places)
    assert mixed[1].isnan().all() and not mixed[0].isnan().any() and not mixed[2].isnan().any()


def test_a_token_keeps_its_bits_in_any_batch_and_order(device):
    outputs, weights = torch.randn(7, CHOICES, 300).bfloat16().to(device), torch.rand(7, CHOICES).to(device)
    as_they_are = torch.arange(7 * CHOICES, dtype=torch.int32, device=device)
    whole = mix_kernel(outputs.flatten(0, 1), weights, as_they_are)
    order = torch.randperm(7 * CHOICES, device=device)
    assert torch.equal(mix_kernel(outputs.flatten(0, 1)[order], weights, places_kernel(order)), whole)
    for some in (slice(0, 1), slice(2, 3), slice(3, 7)):
        slots = outputs[some].flatten(0, 1)
        assert torch.equal(mix_kernel(slots, weights[some], as_they_are[: len(slots)]), whole[some])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("slots_count", [0, 1, 1025])
def test_places_are_the_inverse_of_an_order(slots_count, dtype, device):
    order = torch.randperm(slots_count).to(dtype)
    places = places_kernel(order.to(device)).cpu()
    assert places.dtype == torch.int32
    assert torch.equal(places[order.long()], torch.arange(slots_count, dtype=torch.int32))


def test_the_mixtures_reach_their_kernel_and_are_those_of_a_cpu(device):
    outputs, weights = torch.randn(4 * CHOICES, 20), torch.rand(4, CHOICES)
    order = torch.randperm(4 * CHOICES)
    expected = mix(outputs, weights, order)
    outputs, weights, order = outputs.to(device), weights.to(device), order.to(device)
    with kernels_forced() if device.type == "cpu" else nullcontext():
        found = [mix(outputs, weights, order), mix_placed(outputs, weights, order.argsort().int())]
    assert all(torch.allclose(mixed.cpu(), expected, atol=TOLERANCE) for mixed in found)


def test_places_that_do_not_fit_are_refused(device):
    with pytest.raises(ValueError, match="5 places do not fit"):
        mix_placed(torch.zeros(6, 4, device=device), torch.zeros(1, 6), torch.zeros(5, dtype=torch.int32))
