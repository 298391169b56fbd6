"""Rotary positions: turns of complex numbers, in both layouts, as transformers turns them."""

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from kernels.ops.rotary import rotate, rotate_reference, rotation
from tests.kernels.ops.rows import DTYPES, ROWS_COUNT, THREADS, assert_rows_keep_their_bits, threads

TURN_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SCORE_TOLERANCE = 1e-4
PAIRS = 16
FREQUENCIES = 10000.0 ** (-torch.arange(PAIRS) / PAIRS)
POSITIONS = torch.tensor([0, 1, 2, 63, 64, 700, 4095])


def turned(hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool = True):
    """A copy of `hidden [tokens, heads, dim]`, turned."""
    copy = hidden.clone()
    rotate(copy, cosines, sines, interleaved)
    return copy


def turned_as_complex(hidden: torch.Tensor, interleaved: bool, scale: float) -> torch.Tensor:
    """`hidden [tokens, heads, dim]` turned in double precision."""
    wide = hidden.double()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    angles = POSITIONS[:, None, None].double() * FREQUENCIES.double()
    turned = torch.complex(first, second) * torch.polar(torch.full_like(angles, scale), angles)
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_turn_is_a_product_of_complex_numbers(dtype, interleaved, scale):
    hidden = torch.randn(len(POSITIONS), 3, 2 * PAIRS).to(dtype)
    cosines, sines = rotation(POSITIONS[:3], FREQUENCIES, scale)  # float32 angles: small positions are exact
    result = turned(hidden[:3], cosines, sines, interleaved)
    assert result.dtype == dtype and result.shape == hidden[:3].shape
    error = (result.double() - turned_as_complex(hidden, interleaved, scale)[:3]).abs().max()
    assert error < TURN_TOLERANCE[dtype] * hidden.abs().max()


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_are_those_of_transformers(interleaved):
    """Its interleaved form leaves the pairs in another order, the same for queries and keys."""
    queries, keys = torch.randn(len(POSITIONS), 1, 2 * PAIRS), torch.randn(len(POSITIONS), 1, 2 * PAIRS)
    cosines, sines = rotation(POSITIONS, FREQUENCIES, 1.0)
    theirs = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    doubled = [torch.cat([part, part], dim=-1)[None] for part in (cosines, sines)]
    by_head = [part.transpose(0, 1)[None] for part in (queries, keys)]
    turned_queries, turned_keys = (part[0, 0] for part in theirs(*by_head, *doubled))
    ours = [turned(part, cosines, sines, interleaved)[:, 0] for part in (queries, keys)]
    assert (ours[0] @ ours[1].T - turned_queries @ turned_keys.T).abs().max() < SCORE_TOLERANCE


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_alone(interleaved):
    query, key = torch.randn(1, 1, 2 * PAIRS), torch.randn(1, 1, 2 * PAIRS)

    def score(at: int, distance: int) -> torch.Tensor:
        turns = [rotation(torch.tensor([position]), FREQUENCIES, 1.0) for position in (at, at - distance)]
        return (turned(query, *turns[0], interleaved) * turned(key, *turns[1], interleaved)).sum()

    assert (score(5, 5) - score(500, 5)).abs() < SCORE_TOLERANCE
    assert (score(5, 5) - score(5, 4)).abs() > SCORE_TOLERANCE


def test_position_zero_changes_nothing():
    hidden = torch.randn(1, 4, 2 * PAIRS)
    assert torch.equal(turned(hidden, *rotation(torch.tensor([0]), FREQUENCIES, 1.0)), hidden)


@pytest.mark.parametrize("threads_count", THREADS)
@pytest.mark.parametrize("pairs", [9, 16, 32])
def test_a_row_keeps_its_bits_in_any_batch(pairs, threads_count):
    hidden, positions = torch.randn(ROWS_COUNT, 4, 2 * pairs), torch.randint(0, 4096, (ROWS_COUNT,))
    frequencies = 10000.0 ** (-torch.arange(pairs) / pairs)
    with threads(threads_count):
        assert_rows_keep_their_bits(
            lambda some: turned(hidden[some], *rotation(positions[some], frequencies, 1.2)).flatten(1)
        )


@pytest.mark.parametrize("interleaved", [True, False])
def test_only_the_given_part_of_wider_rows_is_turned(interleaved):
    wide, (cosines, sines) = torch.randn(5, 3, 2 * PAIRS + 24), rotation(POSITIONS[:5], FREQUENCIES, 1.0)
    expected = rotate_reference(wide[..., 24:], cosines, sines, interleaved)
    before = wide[..., :24].clone()
    rotate(wide[..., 24:], cosines, sines, interleaved)
    assert torch.equal(wide[..., :24], before)
    assert torch.allclose(wide[..., 24:], expected, atol=1e-6)
