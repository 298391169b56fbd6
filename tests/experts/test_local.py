"""LocalExperts: a plain loop over tokens, in float32 and bfloat16, the same bits in any company."""

import pytest
import torch
from torch.nn import functional

from experts.local import LocalExperts
from experts.weights import every_expert, load_experts
from tests.experts.dispatches import CHOICES, EXPERTS, HIDDEN, drawn_tokens
from tests.kernels.ops.rows import assert_rows_keep_their_bits

MIX_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def looped(experts: LocalExperts, layer: int, hidden, ids, weights) -> torch.Tensor:
    """The mixture of each token by its formula, in double precision."""
    mixed = torch.zeros(len(hidden), HIDDEN, dtype=torch.float64)
    for token, choice in ((token, choice) for token in range(len(hidden)) for choice in range(CHOICES)):
        gated = experts._weights[layer, int(ids[token, choice])]
        gate_up, down = (part.to_dense() if part.is_mkldnn else part for part in (gated.gate_up, gated.down))
        gate, up = gate_up.double().chunk(2)
        state = hidden[token].double()
        mixed[token] += weights[token, choice] * (
            down.double() @ (functional.silu(gate @ state) * (up @ state))
        )
    return mixed


@pytest.mark.parametrize("dtype", MIX_TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", [1, 2])
def test_a_mixture_is_its_formula(checkpoint, layer, dtype):
    experts = LocalExperts.from_checkpoint(checkpoint, dtype)
    tokens = drawn_tokens(9, dtype)
    mixed = experts.dispatch(layer, *tokens).combine()
    expected = looped(experts, layer, *tokens)
    assert mixed.dtype == torch.float32
    assert (mixed - expected).abs().max() < MIX_TOLERANCE[dtype] * expected.abs().max()


def test_a_token_keeps_its_bits_in_any_batch(local):
    hidden, ids, weights = drawn_tokens(130)
    assert_rows_keep_their_bits(
        lambda some: local.dispatch(1, hidden[some], ids[some], weights[some]).combine()
    )


def test_weights_load_by_layer_and_say_so(checkpoint):
    progress = []
    held = load_experts(
        checkpoint, every_expert(checkpoint), torch.bfloat16, lambda *done: progress.append(done)
    )
    assert len(held) == 2 * EXPERTS and progress == [(EXPERTS, 2 * EXPERTS), (2 * EXPERTS, 2 * EXPERTS)]
    assert all(weights.gate_up.dtype == weights.down.dtype == torch.bfloat16 for weights in held.values())
    with pytest.raises(ValueError, match="layer 0, expert 3"):
        load_experts(checkpoint, [(0, 3)], torch.float32)
