"""The gates' kernel against the references in float64, and what neither may do: choose what is not there."""

from contextlib import nullcontext

import pytest
import torch

from kernels.ops.backend import kernels_forced
from kernels.ops.gate import gate_greedy, gate_greedy_reference, gate_noaux_tc, gate_noaux_tc_reference
from kernels.ops.gate_kernel import gate_greedy_kernel, gate_noaux_tc_kernel

WEIGHT_TOLERANCE = 2e-6  # of the scaling
# experts, choices, groups, groups kept: V3, Kimi K2, V2, V2-Lite, and small ones of odd sizes
LIMITS = [(256, 8, 8, 4), (384, 8, 1, 1), (160, 6, 8, 3), (64, 6, 1, 1), (15, 4, 5, 2), (6, 2, 3, 1)]
GATES = ["noaux_tc", "greedy"]


def by_kernel(gate, logits, bias, limits, scaling=2.5, normalised=True):
    """Weights and ids of one of the kernels, on the CPU."""
    if gate == "greedy":
        found = gate_greedy_kernel(logits, *limits[1:], scaling)
    else:
        found = gate_noaux_tc_kernel(logits, bias, *limits[1:], normalised, scaling)
    return tuple(part.cpu() for part in found)


def by_reference(gate, logits, bias, limits, scaling=2.5, normalised=True):
    """Weights and ids in float64."""
    logits, bias = logits.cpu().double(), None if bias is None else bias.cpu().double()
    if gate == "greedy":
        return gate_greedy_reference(logits, *limits[1:], scaling)
    return gate_noaux_tc_reference(logits, bias, *limits[1:], normalised, scaling)


def apart(tokens_count: int, experts_count: int) -> torch.Tensor:
    """Logits `[tokens, experts]` of which no two are so near that rounding could swap them."""
    ranks = torch.stack([torch.randperm(experts_count) for _ in range(tokens_count)])
    return (ranks / experts_count * 8 - 4).float()


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_the_same_experts_in_the_same_order_with_the_same_weights(gate, limits, device):
    logits, bias = apart(5, limits[0]), torch.randn(limits[0]).mul(3).round() / 4
    weights, ids = by_kernel(gate, logits.to(device), bias.to(device), limits)
    expected_weights, expected_ids = by_reference(gate, logits, bias, limits)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    assert (weights - expected_weights).abs().max() < 2.5 * WEIGHT_TOLERANCE


def test_weights_that_are_not_normalised_and_no_bias(device):
    logits = apart(3, 32)
    weights, ids = by_kernel("noaux_tc", logits.to(device), None, (32, 5, 4, 2), 1.5, normalised=False)
    expected_weights, expected_ids = by_reference("noaux_tc", logits, None, (32, 5, 4, 2), 1.5, False)
    assert torch.equal(ids, expected_ids)
    assert (weights - expected_weights).abs().max() < 1.5 * WEIGHT_TOLERANCE


@pytest.mark.parametrize("gate", GATES)
def test_no_tokens_have_no_experts(gate, device):
    weights, ids = by_kernel(gate, torch.empty(0, 16, device=device), None, (16, 4, 4, 2))
    assert weights.shape == ids.shape == (0, 4)


@pytest.mark.parametrize("gate", GATES)
def test_equal_scores_go_to_the_lowest_groups_and_ids(gate, device):
    logits = torch.zeros(3, 20, device=device)
    logits[1, 13] = logits[1, 17] = 1.0
    logits[2, 4:8] = -1.0
    _, ids = by_kernel(gate, logits, None, (20, 3, 5, 2))
    assert ids.tolist() == [[0, 1, 2], [13, 17, 12], [0, 1, 2]]


def test_two_equal_best_of_a_group_count_twice(device):
    logits = torch.tensor([[2.0, 2.0, -9.0, 2.5, 1.0, -9.0]], device=device)
    _, ids = by_kernel("noaux_tc", logits, None, (6, 2, 2, 1))
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("gate", GATES)
def test_rows_may_be_strided_and_what_lies_between_is_not_read(gate, device):
    logits = apart(3, 20).to(device)
    wide = torch.full((3, 64), float("nan"), device=device)
    wide[:, :20] = logits
    limits = (20, 3, 5, 2)
    expected = by_kernel(gate, logits, None, limits)
    for strided in (wide[:, :20], logits.t().contiguous().t()):
        weights, ids = by_kernel(gate, strided, None, limits)
        assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("spoiled", [slice(3, 4), slice(0, 20)], ids=["one", "all"])
def test_a_token_that_is_no_number_spoils_only_itself(gate, spoiled, device):
    logits, limits = apart(3, 20).to(device), (20, 6, 5, 2)
    alone = by_kernel(gate, logits[2:], None, limits)
    for number in (float("nan"), -float("nan")):
        logits[1, spoiled] = number
        weights, ids = by_kernel(gate, logits, None, limits)
        assert torch.equal(weights[2:], alone[0]) and torch.equal(ids[2:], alone[1])
        assert weights[1].isnan().all()
        assert len(set(ids[1].tolist())) == 6 and ids.min() >= 0 and ids.max() < 20


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_greatest_and_the_smallest_logits_are_numbers_still(device):
    logits = torch.tensor([[-1e4, 1e4, -100.0, 100.0, 0.0, -float("inf"), 3.0, 1.0]], device=device)
    for gate in GATES:
        weights, ids = by_kernel(gate, logits, None, (8, 2, 2, 1))
        expected = by_reference(gate, logits, None, (8, 2, 2, 1))
        assert (weights - expected[0]).abs().max() < 2.5 * WEIGHT_TOLERANCE
        # in V2's the second weighs nothing, and of those that do it is the first
        assert set(ids[0].tolist()) == {"noaux_tc": {1, 3}, "greedy": {0, 1}}[gate]


@pytest.mark.parametrize("gate", GATES)
def test_a_token_keeps_its_bits_in_any_batch(gate, device):
    logits, bias, limits = torch.randn(9, 64, device=device) * 3, torch.rand(64, device=device), (64, 6, 8, 3)
    weights, ids = by_kernel(gate, logits, bias, limits)
    for some in (slice(0, 1), slice(3, 4), slice(2, 7), slice(8, 9)):
        part_weights, part_ids = by_kernel(gate, logits[some], bias, limits)
        assert torch.equal(part_weights, weights[some]) and torch.equal(part_ids, ids[some])


def test_the_gates_reach_their_kernels_and_choose_as_on_a_cpu(device):
    logits, bias = apart(4, 16), torch.rand(16).round()
    expected = [gate_noaux_tc(logits, bias, 4, 4, 2, True, 2.5), gate_greedy(logits, 4, 4, 2, 1.0)]
    logits, bias = logits.to(device), bias.to(device)
    with kernels_forced() if device.type == "cpu" else nullcontext():
        found = [gate_noaux_tc(logits, bias, 4, 4, 2, True, 2.5), gate_greedy(logits, 4, 4, 2, 1.0)]
    for (weights, ids), (expected_weights, expected_ids) in zip(found, expected, strict=True):
        assert torch.equal(ids.cpu(), expected_ids)
        assert (weights.cpu() - expected_weights).abs().max() < 2.5 * WEIGHT_TOLERANCE


@pytest.mark.parametrize("limits", [(16, 5, 4, 1), (16, 2, 5, 2)], ids=["too many choices", "odd groups"])
def test_limits_that_do_not_fit_are_refused(limits, device):
    with pytest.raises(ValueError, match="groups must be equal and those kept must hold the choices"):
        by_kernel("greedy", torch.zeros(1, 16, device=device), None, limits)


def test_a_bias_for_other_experts_is_refused(device):
    with pytest.raises(ValueError, match="does not fit logits"):
        by_kernel("noaux_tc", torch.zeros(1, 16, device=device), torch.zeros(8, device=device), (16, 2, 4, 2))
