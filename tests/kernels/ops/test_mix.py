"""The mixture: outputs of experts summed in float32, the same bits in any company."""

import pytest
import torch

from kernels.ops.mix import mix, mix_reference
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

CHOICES = 6


def in_order(slots_count: int) -> torch.Tensor:
    """Slots as they are."""
    return torch.arange(slots_count)


def test_outputs_are_summed_in_float32_however_small_their_type():
    outputs = torch.tensor([[256.0], [1.0]]).bfloat16()  # in bfloat16 their sum would stay 256
    result = mix(outputs, torch.tensor([[1.0, 1.0]]), in_order(2))
    assert result.dtype == torch.float32 and result.item() == 257.0


@pytest.mark.parametrize("mixing", [mix, mix_reference])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_token_mixes_its_own_outputs_in_whatever_order_they_come(dtype, mixing):
    outputs, weights = torch.randn(5 * CHOICES, 7).to(dtype), torch.rand(5, CHOICES)
    expected = torch.stack(
        [weights[token].double() @ outputs.view(5, CHOICES, 7)[token].double() for token in range(5)]
    )
    order = torch.randperm(5 * CHOICES)
    assert (mixing(outputs[order], weights, order) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [100, 128, 512])
def test_a_token_keeps_its_bits_in_any_batch(hidden_size, dtype, threads_count):
    outputs, weights = (
        torch.randn(ROWS_COUNT, CHOICES, hidden_size).to(dtype),
        torch.rand(ROWS_COUNT, CHOICES),
    )

    def mixed(some: slice) -> torch.Tensor:
        slots = outputs[some].flatten(0, 1)
        return mix(slots, weights[some], in_order(len(slots)))

    with threads(threads_count):
        assert_rows_keep_their_bits(mixed)
