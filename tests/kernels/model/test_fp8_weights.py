"""Weights that stay FP8: joined where no block would be of two; a model that is the same but for them."""

from contextlib import nullcontext

import pytest
import torch

from experts.local import LocalExperts
from kernels.model.checkpoint import Checkpoint
from kernels.model.transformer import Transformer, run_lanes
from kernels.ops.backend import kernels_forced
from kernels.ops.linear_fp8 import Fp8Rows, Fp8Weight
from kernels.ops.projection import is_fp8, joined, moved, normed_for, plain, prepared, project
from tests.checkpoints import build
from tests.kernels.model.test_transformer import drawn_prompts, lane_of

LOGITS_TOLERANCE = 0.15  # of activations with three bits after the first, in every product of three layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    """The tiny one whose linear weights are FP8."""
    return Checkpoint(build("fp8", tmp_path_factory.mktemp("fp8")))


@pytest.mark.parametrize(("rows_count", "stays"), [(128, True), (256, True), (100, False)])
def test_weights_stay_fp8_where_blocks_stay_whole(rows_count, stays):
    first, second = torch.randn(rows_count, 200), torch.randn(60, 200)
    both = joined([Fp8Weight.of(first), Fp8Weight.of(second)], torch.float32)
    assert is_fp8(both) == stays
    apart = [plain(Fp8Weight.of(part), torch.float32) for part in (first, second)]
    assert torch.equal(plain(both, torch.float32), torch.cat(apart))


def test_one_plain_weight_makes_all_plain():
    mixed = joined(
        [Fp8Weight.of(torch.ones(128, 128)), torch.ones(4, 128, dtype=torch.bfloat16)], torch.bfloat16
    )
    assert mixed.dtype == torch.bfloat16 and mixed.shape == (132, 128)


def test_a_bias_is_added_to_either(device):
    hidden, weight, bias = torch.randn(3, 128), torch.randn(64, 128), torch.randn(64)
    exact = hidden @ weight.T + bias
    assert torch.allclose(project(hidden, prepared(weight), bias), exact, atol=1e-4)
    given = (hidden.to(device), moved(Fp8Weight.of(weight), device), bias.to(device))
    assert (project(*given).cpu() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_norm_before_an_fp8_weight_leaves_its_launch_as_fp8(device):
    hidden, norm, weight = torch.randn(5, 256).to(device), torch.rand(256).to(device), torch.randn(64, 256)
    narrow = moved(Fp8Weight.of(weight), device)
    with nullcontext() if device.type == "cuda" else kernels_forced():
        for residual in (None, torch.randn(5, 256).to(device)):
            grown = [part if part is None else part.clone() for part in (residual, residual)]
            plain = normed_for(weight.to(device), hidden, norm, 1e-6, grown[0])
            quantised = normed_for(narrow, hidden, norm, 1e-6, grown[1])
            assert isinstance(plain, torch.Tensor) and isinstance(quantised, Fp8Rows)
            assert torch.equal(project(quantised, narrow), project(plain, narrow))
            assert residual is None or torch.equal(*grown)


def test_a_layer_quantises_nothing_that_a_norm_has_left(checkpoint, monkeypatch):
    experts = LocalExperts.from_checkpoint(checkpoint, torch.float32)
    transformer = Transformer.from_checkpoint(checkpoint, torch.float32, experts, keeps_fp8=True)
    attention, quantised = transformer.layers[0].attention, []
    attention._down = Fp8Weight.of(attention._down.to_dense())  # whose blocks would be of two weights
    assert is_fp8(attention._query_up)
    monkeypatch.setattr("kernels.ops.linear_fp8.quantize_rows", quantised.append)
    hidden = torch.randn(3, transformer.config.hidden_size)
    norm = transformer.layers[0].before_attention
    normed = attention.normed(hidden, torch.zeros_like(hidden), norm, 1e-6)
    attention.compress(normed, transformer.rotation(torch.arange(3)))
    assert quantised == []


def test_a_model_that_keeps_fp8_is_nearly_the_one_that_does_not(checkpoint):
    experts = LocalExperts.from_checkpoint(checkpoint, torch.float32)
    prompts = drawn_prompts(20, 7)
    logits = []
    for keeps_fp8 in (False, True):
        transformer = Transformer.from_checkpoint(checkpoint, torch.float32, experts, keeps_fp8=keeps_fp8)
        assert is_fp8(transformer.layers[1].attention._out) == keeps_fp8
        with torch.inference_mode():
            logits.append(transformer.logits(run_lanes([lane_of(transformer, prompts)])[0]))
    assert not torch.equal(*logits)
    apart = (logits[0] - logits[1]).norm(dim=1) / logits[0].norm(dim=1)
    assert apart.median() < LOGITS_TOLERANCE, "a token whose gate is near a tie may go to other experts"
