"""The MLP of many experts: plain loops, transformers' experts, and the same bits in any company."""

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from kernels.ops.expert_mlp import GatedWeights, expert_mlp, gated_mlp, silu_by_row
from kernels.ops.linear import packed
from kernels.ops.mix import mix
from kernels.ops.sort_by_expert import sort_by_expert
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
HIDDEN, INTERMEDIATE, EXPERTS, CHOICES = 48, 40, 6, 3


def kept_plain(gate_up: torch.Tensor, down: torch.Tensor) -> GatedWeights:
    """As a GPU keeps them, and a CPU without oneDNN."""
    return GatedWeights(gate_up, down)


def kept_packed(gate_up: torch.Tensor, down: torch.Tensor) -> GatedWeights:
    """As a CPU keeps large ones."""
    return GatedWeights(packed(gate_up), packed(down))


def kept_as_is_best(gate_up: torch.Tensor, down: torch.Tensor) -> GatedWeights:
    """As weights of a checkpoint are kept: small ones of float32 for compiled loops."""
    return GatedWeights.packed(*gate_up.chunk(2), down, down.dtype)


KEPT = (kept_plain, kept_packed, kept_as_is_best)


def drawn_experts(
    dtype: torch.dtype, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, kept=kept_as_is_best
) -> list[GatedWeights]:
    """Weights of EXPERTS experts."""
    return [
        kept(
            (torch.randn(2 * intermediate, hidden) / hidden**0.5).to(dtype),
            (torch.randn(hidden, intermediate) / intermediate**0.5).to(dtype),
        )
        for _ in range(EXPERTS)
    ]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_gated_mlp_is_its_formula(dtype, kept):
    [plain, *_], hidden = drawn_experts(dtype, kept=kept_plain), torch.randn(7, HIDDEN).to(dtype)
    gate, up = plain.gate_up.double().chunk(2)
    wide = hidden.double()
    expected = (functional.silu(wide @ gate.T) * (wide @ up.T)) @ plain.down.double().T
    result = gated_mlp(hidden, kept(plain.gate_up, plain.down))
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() < OUTPUT_TOLERANCE[dtype] * expected.abs().max()


def test_only_small_weights_of_float32_are_kept_for_compiled_loops():
    assert drawn_experts(torch.float32)[0].are_small
    assert not drawn_experts(torch.bfloat16)[0].are_small
    assert not drawn_experts(torch.float32, 256, 512)[0].are_small
    assert not drawn_experts(torch.float32, kept=kept_plain)[0].are_small


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_slot_is_its_token_through_its_expert(dtype, kept):
    experts, hidden = drawn_experts(dtype, kept=kept), torch.randn(20, HIDDEN).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in hidden])
    ids[ids == 4] = 5  # nobody goes to one expert; two choices of a token may be the same
    order, present, counts = sort_by_expert(ids)
    assert 4 not in present
    outputs = expert_mlp(hidden, order // CHOICES, [experts[expert] for expert in present], counts)
    for place, slot in enumerate(order.tolist()):
        token, choice = divmod(slot, CHOICES)
        expected = gated_mlp(hidden[token : token + 1], experts[ids[token, choice]])
        assert torch.equal(outputs[place : place + 1], expected)


def test_experts_without_slots_are_passed_over():
    experts, hidden = drawn_experts(torch.float32), torch.randn(2, HIDDEN)
    outputs = expert_mlp(hidden, torch.tensor([1, 0]), experts[:3], [0, 2, 0])
    assert torch.equal(outputs, gated_mlp(hidden, experts[1])[[1, 0]])


def test_the_mixture_is_that_of_transformers():
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOICES,
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV3Experts(config)
    experts, hidden = drawn_experts(torch.float32, kept=kept_plain), torch.randn(20, HIDDEN)
    with torch.inference_mode():
        theirs.gate_up_proj.copy_(torch.stack([weights.gate_up for weights in experts]))
        theirs.down_proj.copy_(torch.stack([weights.down for weights in experts]))
        ids = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in hidden])
        expert_weights = torch.rand(20, CHOICES)
        order, present, counts = sort_by_expert(ids)
        outputs = torch.empty(20 * CHOICES, HIDDEN)
        outputs[order] = expert_mlp(hidden, order // CHOICES, [experts[expert] for expert in present], counts)
        expected = theirs(hidden, ids, expert_weights)
    error = (mix(outputs, expert_weights, torch.arange(60)) - expected).abs().max()
    assert error < OUTPUT_TOLERANCE[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("intermediate", [36, 64, 256, 1408])
@pytest.mark.parametrize("kept", KEPT)
def test_a_row_keeps_its_bits_in_any_batch(kept, intermediate, dtype, threads_count):
    [weights, *_], hidden = (
        drawn_experts(dtype, 64, intermediate, kept),
        torch.randn(ROWS_COUNT, 64).to(dtype),
    )
    with threads(threads_count):
        assert_rows_keep_their_bits(lambda some: gated_mlp(hidden[some], weights))


@pytest.mark.parametrize("threads_count", THREADS)
def test_silu_keeps_its_bits_where_threads_share_it_out(threads_count):
    wider = torch.randn(300, 2 * 333) * 3
    gate = wider[:, :333]
    with threads(threads_count):
        whole = silu_by_row(gate)
        assert torch.equal(whole, torch.cat([silu_by_row(gate[row : row + 1]) for row in range(300)]))
    assert torch.allclose(whole, functional.silu(gate), atol=1e-6)
