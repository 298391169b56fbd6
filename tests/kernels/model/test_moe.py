"""The choice of experts: a token's is the same in any company."""

import pytest
import torch

from kernels.model.moe import MixtureOfExperts
from tests.kernels.model.models import configs
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads


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
    moe = MixtureOfExperts(config, weights, 0)
    hidden = torch.randn(ROWS_COUNT, 48).to(dtype)

    def chosen(some: slice) -> torch.Tensor:
        expert_weights, ids = moe.choose(hidden[some])
        assert expert_weights.dtype == torch.float32
        return torch.cat([expert_weights.double(), ids.double(), moe.shared(hidden[some]).double()], dim=1)

    with threads(threads_count):
        assert_rows_keep_their_bits(chosen)
