"""Sampling against plain definitions of each filter, and the promises that a continued request rests on."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.ops.sample import GOLDEN_64, MASK_64, SampleError, SampleRow, _mix_64, sample, uniform

VOCAB = 37

finite_logits = st.lists(st.integers(-3000, 3000).map(lambda n: n / 100), min_size=VOCAB, max_size=VOCAB)
row_options = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**64 - 1),
        "position": st.integers(0, 200_000),
        "temperature": st.sampled_from([0.0, 1e-5, 0.3, 1.0, 5.0]),
        "top_k": st.integers(0, VOCAB + 3),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3]),
        "presence_penalty": st.sampled_from([0.0, -1.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "banned_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
        "logprobs_count": st.sampled_from([None, 0, 4]),
    }
)


def row_from(options: dict) -> SampleRow:
    counts = torch.zeros(VOCAB, dtype=torch.int32)
    counts[:5] = 2
    return SampleRow(prompt_token_ids=torch.tensor([3, 3, 7]), output_token_counts=counts, **options)


def kept_probabilities(logits: torch.Tensor, row: SampleRow) -> dict[int, float]:
    """The distribution that temperature, top-k, top-p and min-p leave: one token after another, by rank."""
    scaled = [(value / row.temperature, token) for token, value in enumerate(logits.tolist())]
    best = max(scaled)[0]
    ranked = sorted(((math.exp(value - best), token) for value, token in scaled), key=lambda x: (-x[0], x[1]))
    ranked = ranked[: row.top_k or None]
    total = sum(weight for weight, _ in ranked)
    nucleus, mass = [], 0.0
    for weight, token in ranked:
        if nucleus and mass >= row.top_p * total:
            break
        nucleus.append((weight, token))
        mass += weight
    kept = [(weight, token) for weight, token in nucleus if weight >= row.min_p]
    total = sum(weight for weight, _ in kept)
    return {token: weight / total for weight, token in kept}


def drawn_counts(logits: torch.Tensor, row_count: int, **options) -> torch.Tensor:
    """How often each token is drawn over so many positions."""
    rows = [SampleRow(position=position, **options) for position in range(row_count)]
    token_ids = sample(logits.expand(row_count, -1), rows).token_ids
    return torch.bincount(torch.tensor(token_ids), minlength=logits.numel())


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_distribution_that_the_filters_leave(options):
    logits = torch.randn(VOCAB) * 1.5
    expected = kept_probabilities(logits, SampleRow(**options))
    draw_count = 20_000
    counts = drawn_counts(logits, draw_count, seed=11, **options)
    assert {token for token, count in enumerate(counts.tolist()) if count} <= set(expected)
    often = [token for token, p in expected.items() if draw_count * p >= 10]
    cells = [(counts[token].item(), draw_count * expected[token]) for token in often]
    cells.append((draw_count - sum(seen for seen, _ in cells), draw_count - sum(p for _, p in cells) + 1e-9))
    chi_square = sum((seen - due) ** 2 / due for seen, due in cells if due > 1)
    assert chi_square < len(often) + 5 * math.sqrt(2 * len(often))


def test_seeds_and_positions_both_give_independent_draws():
    by_seed = [uniform(seed, 5) for seed in range(10_000)]
    by_position = [uniform(5, position) for position in range(10_000)]
    for numbers in (by_seed, by_position):
        assert 0 <= min(numbers) <= max(numbers) < 1
        tenths = torch.bincount((torch.tensor(numbers) * 10).long(), minlength=10)
        assert ((tenths - 1000) ** 2 / 1000).sum() < 9 + 5 * math.sqrt(18)
        pairs = torch.tensor([numbers[:-1], numbers[1:]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.04


def test_uniform_numbers_never_change():
    """A request that moves to a newer node must go on with the same numbers: these are part of the format."""
    known = [0.8833108082136426, 0.3097152798288182, 0.8811123988031333]
    assert [uniform(0, 0), uniform(1234567, 1), uniform(-1, 4095)] == known
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)


def test_bits_are_mixed_as_splitmix64_does():
    """The first numbers that the published algorithm gives for the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [_mix_64(1234567 + step * GOLDEN_64 & MASK_64) for step in (1, 2, 3)] == published


@given(finite_logits, st.lists(row_options, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_row_never_depends_on_its_neighbours(values, options, random):
    rows = [row_from(each) for each in options]
    logits = torch.tensor([random.sample(values, VOCAB) for _ in rows], dtype=torch.float32)
    together = sample(logits, rows)
    for index, row in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), [row])
        assert alone.token_ids == together.token_ids[index : index + 1]
        assert alone.logprobs == together.logprobs[index : index + 1]


def test_a_row_never_depends_on_its_neighbours_at_a_real_vocabulary_size():
    logits = torch.randn(9, 50_001)
    filters = [FILTERS[index % len(FILTERS)] for index in range(9)]
    rows = [SampleRow(seed=index, position=100 + index, **each) for index, each in enumerate(filters)]
    together = sample(logits, rows).token_ids
    assert together == [sample(logits[i : i + 1], [rows[i]]).token_ids[0] for i in range(9)]
    assert together[::-1] == sample(logits.flip(0), rows[::-1]).token_ids
    strided = torch.randn(50_001, 9).T.copy_(logits)
    assert together == sample(strided, rows).token_ids


@given(finite_logits, row_options)
def test_what_is_drawn_is_what_the_filters_leave(values, options):
    plain = {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "banned_token_ids": (),
    }
    row = SampleRow(**(options | plain | {"temperature": options["temperature"] or 0.7}))
    logits = torch.tensor([values], dtype=torch.float32)
    token = sample(logits, [row]).token_ids[0]
    a_hair_looser = {"top_p": row.top_p + 1e-9, "min_p": row.min_p - 1e-9}
    kept = kept_probabilities(logits[0], replace(row, **a_hair_looser))
    assert token in kept


@given(finite_logits, st.integers(0, 2**64 - 1), st.sampled_from([1e-30, 0.1, 1.0, 1e30]))
def test_one_kept_token_is_the_greedy_one(values, seed, temperature):
    logits = torch.tensor([values], dtype=torch.float32)
    greedy = sample(logits, [SampleRow()]).token_ids
    assert greedy == [values.index(max(values))]
    assert sample(logits, [SampleRow(seed=seed, temperature=temperature, top_k=1)]).token_ids == greedy
    clear = logits.clone()
    clear[0, greedy[0]] += 1.0
    for options in ({"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30}):
        row = SampleRow(**({"seed": seed, "temperature": 0.8} | options))
        assert sample(clear, [row]).token_ids == greedy


def test_ties_at_a_border_keep_the_lower_ids():
    logits = torch.zeros(10)
    assert drawn_counts(logits, 500, temperature=1.0, top_k=3).nonzero().flatten().tolist() == [0, 1, 2]
    assert drawn_counts(logits, 500, temperature=1.0, top_p=0.4).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert sample(logits[None], [SampleRow()]).token_ids == [0]


def test_penalties_are_those_of_their_definitions():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, 3.0]])
    counts = torch.tensor([0, 0, 3, 1, 0], dtype=torch.int32)
    options = {"prompt_token_ids": torch.tensor([0, 1, 0]), "output_token_counts": counts, "temperature": 1.0}
    before = logits.clone()
    for penalties, expected in [
        ({"repetition_penalty": 2.0}, [1.0, -4.0, 0.5, 0.25, 3.0]),
        ({"presence_penalty": 0.5}, [2.0, -2.0, 0.5, 0.0, 3.0]),
        ({"frequency_penalty": 0.5}, [2.0, -2.0, -0.5, 0.0, 3.0]),
        (
            {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": -0.5},
            [1.0, -4.0, 1.75, 0.5, 3.0],
        ),
    ]:
        penalised = [SampleRow(position=p, **options, **penalties) for p in range(300)]
        plain = [SampleRow(position=p, temperature=1.0) for p in range(300)]
        assert (
            sample(logits.expand(300, -1), penalised).token_ids
            == sample(torch.tensor([expected]).expand(300, -1), plain).token_ids
        )
    assert torch.equal(logits, before)


def test_greedy_obeys_penalties_and_bans():
    logits = torch.tensor([[5.0, 4.0, 3.0], [5.0, 4.0, 3.0], [5.0, 4.0, 3.0]])
    counts = torch.tensor([4, 0, 0], dtype=torch.int32)
    rows = [
        SampleRow(frequency_penalty=1.0, output_token_counts=counts),
        SampleRow(banned_token_ids=(0, 1)),
        SampleRow(repetition_penalty=9.0, prompt_token_ids=torch.tensor([0, 1])),
    ]
    assert sample(logits, rows).token_ids == [1, 2, 2]


def test_penalties_before_the_first_output_token_leave_the_logits():
    row = SampleRow(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=2.0)
    assert sample(torch.tensor([[1.0, 2.0]]), [row]).token_ids == [1]


def test_a_banned_token_is_never_drawn():
    logits = torch.zeros(4)
    assert drawn_counts(logits, 400, temperature=1.0, banned_token_ids=(1, 3)).count_nonzero() == 2


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(3, VOCAB)
    rows = [
        SampleRow(temperature=0.2, top_k=3, banned_token_ids=(0,), logprobs_count=5),
        SampleRow(logprobs_count=0),
        SampleRow(),
    ]
    samples = sample(logits, rows)
    expected = torch.log_softmax(logits.double(), dim=-1)
    for index, count in ((0, 5), (1, 0)):
        values, ids = expected[index].sort(descending=True)
        assert samples.logprobs[index].chosen == pytest.approx(
            expected[index, samples.token_ids[index]].item()
        )
        assert [token for token, _ in samples.logprobs[index].top] == ids[:count].tolist()
        assert [value for _, value in samples.logprobs[index].top] == pytest.approx(values[:count].tolist())
    assert samples.logprobs[2] is None


def test_logprobs_of_ties_come_by_id_and_never_more_than_there_are():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    ids = [
        [token for token, _ in sample(logits, [SampleRow(logprobs_count=n)]).logprobs[0].top] for n in (2, 9)
    ]
    assert ids == [[1, 2], [1, 2, 3, 0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_next_token_are_named_and_the_rest_can_go_on(bad, temperature):
    logits = torch.randn(4, VOCAB)
    logits[1] = bad
    if bad > 0 or math.isnan(bad):
        logits[1, 1:] = 0.0
    rows = [SampleRow(temperature=temperature, top_p=0.9, seed=index) for index in range(4)]
    rows[3] = SampleRow(banned_token_ids=tuple(range(VOCAB)))
    with pytest.raises(SampleError, match="row 1: its logits hold NaN or infinity; row 3: bans") as caught:
        sample(logits, rows)
    assert set(caught.value.reasons) == {1, 3}
    assert len(sample(logits[[0, 2]], [rows[0], rows[2]]).token_ids) == 2


def test_single_minus_infinities_are_tokens_that_cannot_be_drawn():
    logits = torch.full((VOCAB,), -math.inf)
    logits[[4, 9]] = 1.0
    assert drawn_counts(logits, 300, temperature=1.0, top_p=0.999).nonzero().flatten().tolist() == [4, 9]


def test_rows_and_logits_must_match():
    with pytest.raises(ValueError, match="logits have 2 rows, but 1 rows"):
        sample(torch.zeros(2, 3), [SampleRow()])
