"""The mixture: outputs of experts summed in float32, the same bits in any company."""

import pytest
import torch

from kernels.model.moe import MixtureOfExperts, mix
from tests.kernels.model.models import configs
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

CHOICES = 6


def test_outputs_are_summed_in_float32_however_small_their_type():
    outputs = torch.tensor([[256.0], [1.0]]).bfloat16()  # in bfloat16 their sum would stay 256
    result = mix(outputs, torch.tensor([[1.0, 1.0]]))
    assert result.dtype == torch.float32 and result.item() == 257.0


def test_each_token_mixes_its_own_outputs():
    outputs, weights = torch.randn(5 * CHOICES, 7), torch.rand(5, CHOICES)
    expected = torch.stack(
        [weights[token].double() @ outputs.view(5, CHOICES, 7)[token].double() for token in range(5)]
    )
    assert (mix(outputs, weights) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [100, 128, 512])
def test_a_token_keeps_its_bits_in_any_batch(hidden_size, dtype, threads_count):
    outputs, weights = (
        torch.randn(ROWS_COUNT, CHOICES, hidden_size).to(dtype),
        torch.rand(ROWS_COUNT, CHOICES),
    )
    with threads(threads_count):
        assert_rows_keep_their_bits(lambda some: mix(outputs[some].flatten(0, 1), weights[some]))


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_chooses_the_same_experts_in_any_batch(dtype, threads_count):
    experts = {
        "first_k_dense_replace": 0,
        "n_routed_experts": 20,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
    }
    _, config = configs(**experts, n_group=4, topk_group=2)
    prefix = "model.layers.0.mlp."
    weights = {
        f"{prefix}gate.weight": torch.randn(20, 48).to(dtype),
        f"{prefix}gate.e_score_correction_bias": torch.rand(20),
        f"{prefix}shared_experts.gate_proj.weight": torch.randn(16, 48).to(dtype),
        f"{prefix}shared_experts.up_proj.weight": torch.randn(16, 48).to(dtype),
        f"{prefix}shared_experts.down_proj.weight": torch.randn(48, 16).to(dtype),
    }
    moe = MixtureOfExperts(config, weights, 0, routed=None)
    hidden = torch.randn(ROWS_COUNT, 48).to(dtype)

    def chosen(some: slice) -> torch.Tensor:
        expert_weights, ids = moe.choose(hidden[some])
        assert expert_weights.dtype == torch.float32
        return torch.cat([expert_weights.double(), ids.double(), moe.shared(hidden[some]).double()], dim=1)

    with threads(threads_count):
        assert_rows_keep_their_bits(chosen)
