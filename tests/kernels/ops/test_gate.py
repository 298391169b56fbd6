"""Gates: the experts and weights of plain loops and of transformers, a row's the same in any batch."""

import math

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from kernels.ops.gate import gate_greedy, gate_noaux_tc, gate_noaux_tc_reference, sigmoid
from tests.kernels.ops.rows import ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

WEIGHT_TOLERANCE = 1e-6
HIDDEN = 32
# experts, choices, groups, groups kept
LIMITS = [(16, 4, 1, 1), (16, 4, 4, 2), (20, 3, 5, 2), (32, 6, 4, 4), (8, 8, 4, 4), (256, 8, 8, 4)]


def by_expert(weights: torch.Tensor, ids: torch.Tensor, experts_count: int) -> torch.Tensor:
    """Weights `[tokens, experts]`, 0 for those not chosen."""
    return torch.zeros(len(weights), experts_count).scatter_(1, ids, weights)


def together(weights_and_ids: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Weights and ids side by side."""
    return torch.cat([part.double() for part in weights_and_ids], dim=1)


def best(values: dict[int, float], count: int) -> list[int]:
    """The keys of the largest values, in order."""
    return sorted(values, key=lambda key: -values[key])[:count]


def loop_over_tokens(logits, bias, limits, scaling, method, normalised=True) -> torch.Tensor:
    """Both gates written out for one token at a time, in Python's own numbers."""
    experts_count, choices, groups_count, groups_kept = limits
    size = experts_count // groups_count
    rows = []
    for token in logits.tolist():
        if method == "noaux_tc":
            scores = [1 / (1 + math.exp(-logit)) for logit in token]
        else:
            total = sum(math.exp(logit - max(token)) for logit in token)
            scores = [math.exp(logit - max(token)) / total for logit in token]
        choice = dict(enumerate(score + added for score, added in zip(scores, bias.tolist(), strict=True)))
        group_scores = {}
        for group in range(groups_count):
            members = sorted(choice[expert] for expert in range(group * size, (group + 1) * size))
            group_scores[group] = sum(members[-2:]) if method == "noaux_tc" else members[-1]
        kept = best(group_scores, groups_kept)
        chosen = best({expert: value for expert, value in choice.items() if expert // size in kept}, choices)
        total = sum(scores[expert] for expert in chosen) if method == "noaux_tc" and normalised else 1.0
        weights = {expert: scores[expert] / total * scaling for expert in chosen}
        rows.append([weights.get(expert, 0.0) for expert in range(experts_count)])
    return torch.tensor(rows)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("gate", [gate_noaux_tc, gate_noaux_tc_reference])
def test_the_v3_gate_is_that_of_a_plain_loop(gate, limits, normalised):
    logits, bias = torch.randn(40, limits[0]), torch.rand(limits[0]) - 0.5
    weights, ids = gate(logits, bias, *limits[1:], normalised, 2.5)
    expected = loop_over_tokens(logits, bias, limits, 2.5, "noaux_tc", normalised)
    assert (by_expert(weights, ids, limits[0]) - expected).abs().max() < WEIGHT_TOLERANCE
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_v2_gate_is_that_of_a_plain_loop(limits):
    logits = torch.randn(40, limits[0])
    weights, ids = gate_greedy(logits, *limits[1:], 16.0)
    expected = loop_over_tokens(logits, torch.zeros(limits[0]), limits, 16.0, "greedy")
    assert (by_expert(weights, ids, limits[0]) - expected).abs().max() < 16 * WEIGHT_TOLERANCE


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_v3_gate_is_that_of_transformers(limits):
    experts_count, choices, groups_count, groups_kept = limits
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=experts_count,
        num_experts_per_tok=choices,
        n_group=groups_count,
        topk_group=groups_kept,
        routed_scaling_factor=2.446,
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.rand(experts_count) - 0.5)
    with torch.inference_mode():
        logits, weights, ids = router(torch.randn(50, HIDDEN))
        ours = gate_noaux_tc(logits, router.e_score_correction_bias, *limits[1:], True, 2.446)
    difference = by_expert(*ours, experts_count) - by_expert(weights, ids, experts_count)
    assert difference.abs().max() < WEIGHT_TOLERANCE


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_v2_gate_is_that_of_transformers(limits):
    experts_count, choices, groups_count, groups_kept = limits
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        n_routed_experts=experts_count,
        num_experts_per_tok=choices,
        topk_method="group_limited_greedy" if groups_count > 1 else "greedy",
        n_group=groups_count,
        topk_group=groups_kept,
        routed_scaling_factor=16.0,
    )
    router = DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    with torch.inference_mode():
        logits, weights, ids = router(torch.randn(50, HIDDEN))
        ours = gate_greedy(logits, *limits[1:], 16.0)
    difference = by_expert(*ours, experts_count) - by_expert(weights, ids, experts_count)
    assert difference.abs().max() < 16 * WEIGHT_TOLERANCE


def test_the_bias_steers_the_choice_and_not_the_weights():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    weights, ids = gate_noaux_tc(logits, bias, 2, 1, 1, False, 1.0)
    assert set(ids[0].tolist()) == {0, 3}
    expected = torch.tensor([2.0, -1.0]).sigmoid().sort().values
    assert torch.allclose(weights[0].sort().values, expected, atol=WEIGHT_TOLERANCE)


def test_an_expert_outside_the_kept_groups_never_counts():
    """The second choice has a score of 0, as have the masked ones: whichever is taken, it weighs nothing."""
    weights, _ = gate_greedy(torch.tensor([[10.0, -200.0, 9.0, 9.0]]), 2, 2, 1, 1.0)
    assert weights[0, 0] > 0.5 and weights[0, 1] == 0


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("experts_count", [16, 20, 64, 256])
def test_a_row_keeps_its_bits_in_any_batch(experts_count, threads_count):
    logits, bias = torch.randn(ROWS_COUNT, experts_count) * 3, torch.rand(experts_count)
    with threads(threads_count):
        assert_rows_keep_their_bits(
            lambda some: together(gate_noaux_tc(logits[some], bias, 4, 4, 2, True, 2.5)),
        )
        assert_rows_keep_their_bits(lambda some: together(gate_greedy(logits[some], 4, 4, 2, 1.0)))


def test_sigmoid_has_no_limits_that_break_it():
    logits = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4])
    assert torch.allclose(sigmoid(logits), logits.sigmoid(), atol=1e-7)
    assert logits[0] == -1e4, "the input must stay as it is"


def test_a_token_that_is_no_number_spoils_only_itself():
    logits = torch.randn(3, 16)
    alone = gate_noaux_tc(logits[2:], None, 4, 4, 2, True, 2.5)
    logits[1] = float("nan")
    weights, ids = gate_noaux_tc(logits, None, 4, 4, 2, True, 2.5)
    assert torch.equal(weights[2:], alone[0]) and torch.equal(ids[2:], alone[1])
    assert weights[1].isnan().all() and ((ids >= 0) & (ids < 16)).all()
