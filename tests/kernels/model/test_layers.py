"""Rotary frequencies and YaRN as transformers has them, at its edges too."""

import math

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

from kernels.model.layers import gated_weights, rope_frequencies, rope_scale, softmax_scale, yarn_mscale
from kernels.ops.rotary import rotation
from tests.kernels.model.models import YARN, configs

FREQUENCY_TOLERANCE = 1e-7
EDGES = {
    "published": {"factor": 40.0, "original_max_position_embeddings": 4096},
    "no stretch": {"factor": 1.0},
    "no mscale": {"mscale": None, "mscale_all_dim": None},
    "mscale alone": {"mscale": 0.707, "mscale_all_dim": None},
    "mscale for all alone": {"mscale": None, "mscale_all_dim": 0.707},
    "mscale for all of zero": {"mscale": 1.0, "mscale_all_dim": 0.0},
    "two mscales": {"mscale": 0.707, "mscale_all_dim": 1.0},
    "attention factor": {"attention_factor": 0.5},
    "ramp not on whole pairs": {"truncate": False},
    "ramp of no width": {"beta_fast": 1, "beta_slow": 1, "truncate": False},
    "ramp beyond the last pair": {"original_max_position_embeddings": 1 << 20},
    "ramp before the first pair": {"original_max_position_embeddings": 4},
    "another theta": {"rope_theta": 1e6},
}


@pytest.mark.parametrize("edge", EDGES)
def test_yarn_is_that_of_transformers(edge):
    values = {name: value for name, value in (YARN | EDGES[edge]).items() if value is not None}
    theirs, ours = configs(rope_parameters=values)
    embedding = DeepseekV3RotaryEmbedding(theirs)
    frequencies = rope_frequencies(ours.rope, ours.qk_rope_head_dim)
    assert torch.allclose(frequencies, embedding.inv_freq, rtol=FREQUENCY_TOLERANCE, atol=0)
    assert rope_scale(ours.rope) == pytest.approx(embedding.attention_scaling, rel=1e-12)
    expected_scale = yarn_apply_mscale(theirs.rope_parameters, ours.qk_head_dim**-0.5)
    assert softmax_scale(ours) == pytest.approx(expected_scale, rel=1e-12)
    positions = torch.tensor([0, 1, 63, 64, 4095])
    cosines, sines = rotation(positions, frequencies, rope_scale(ours.rope))
    theirs_cosines, theirs_sines = embedding(torch.empty(0), positions[None])
    pairs = ours.qk_rope_head_dim // 2
    assert torch.allclose(cosines, theirs_cosines[0, :, :pairs], atol=1e-6)
    assert torch.allclose(sines, theirs_sines[0, :, :pairs], atol=1e-6)


def test_without_yarn_frequencies_are_powers_of_theta():
    _, ours = configs()
    expected = torch.tensor([10000.0 ** (-2 * pair / 8) for pair in range(4)])
    assert torch.allclose(rope_frequencies(ours.rope, 8), expected, rtol=1e-6)
    assert rope_scale(ours.rope) == 1.0
    assert softmax_scale(ours) == pytest.approx(1 / math.sqrt(24))


def test_yarn_leaves_quick_pairs_and_stretches_slow_ones():
    _, ours = configs(qk_rope_head_dim=64, rope_parameters=YARN | {"original_max_position_embeddings": 4096})
    stretched = rope_frequencies(ours.rope, 64)
    plain = torch.tensor([10000.0 ** (-2 * pair / 64) for pair in range(32)])
    assert torch.allclose(stretched[0], plain[0]) and torch.allclose(stretched[-1], plain[-1] / 40)


def test_mscale_grows_with_the_stretch_and_starts_at_one():
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1 + 0.1 * math.log(40))


def test_gate_stands_before_up():
    weights = {
        f"mlp.{name}_proj.weight": torch.full((2, 3), value) for name, value in (("gate", 1.0), ("up", 2.0))
    }
    weights["mlp.down_proj.weight"] = torch.zeros(3, 2)
    gated = gated_weights(weights, "mlp.", torch.float32)
    assert torch.equal(gated.gate_up, torch.tensor([[1.0] * 3] * 2 + [[2.0] * 3] * 2))
    assert gated.down.shape == (3, 2)
