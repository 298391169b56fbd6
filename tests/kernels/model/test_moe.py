"""The choice of experts: a token's is the same in any company, and on a GPU."""

from contextlib import nullcontext

import pytest
import torch

from kernels.model.moe import MixtureOfExperts
from kernels.ops.backend import kernels_forced
from tests.kernels.model.models import configs
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

WEIGHTS_TOLERANCE = 1e-5  # of float32 sums in another order; a gate in bfloat16 would be off by 1e-2


def drawn_mixture(dtype: torch.dtype, device: torch.device | str = "cpu") -> MixtureOfExperts:
    """A gate for 20 experts and one shared expert, whose numbers depend on the seed alone."""
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
    return MixtureOfExperts(config, {name: weight.to(device) for name, weight in weights.items()}, 0)


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_chooses_the_same_experts_in_any_batch(dtype, threads_count):
    moe = drawn_mixture(dtype)
    hidden = torch.randn(ROWS_COUNT, 48).to(dtype)

    def chosen(some: slice) -> torch.Tensor:
        expert_weights, ids = moe.choose(hidden[some])
        assert expert_weights.dtype == torch.float32
        return torch.cat([expert_weights.double(), ids.double(), moe.shared(hidden[some]).double()], dim=1)

    with threads(threads_count):
        assert_rows_keep_their_bits(chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_keeps_the_gate_as_it_is_and_chooses_alike(dtype, seed, device):
    plain = drawn_mixture(dtype)
    torch.manual_seed(seed)
    with nullcontext() if device.type == "cuda" else kernels_forced():
        moe = drawn_mixture(dtype, device)
        assert moe._gate.dtype == dtype and plain._gate.dtype == torch.float32
        assert moe._gate_bias.dtype == torch.float32
        hidden = torch.randn(9, 48).to(dtype)
        weights, ids = moe.choose(hidden.to(device))
    expected_weights, expected_ids = plain.choose(hidden)
    assert weights.dtype == torch.float32 and torch.equal(ids.cpu(), expected_ids)
    assert (weights.cpu() - expected_weights).abs().max() < WEIGHTS_TOLERANCE
