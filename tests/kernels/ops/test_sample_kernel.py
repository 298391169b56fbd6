"""Sampling by kernels against sampling by torch on the CPU, token for token, in blocks smaller than a row."""

import math
import random
from contextlib import nullcontext

import pytest
import torch

from kernels.ops import draw_kernel as draws
from kernels.ops import sample_kernel as greatest
from kernels.ops.backend import kernels_forced
from kernels.ops.sample import WEIGHT_ONE, SampleError, SampleRow, sample, sample_each

VOCAB = 300
MARGIN = 64  # of 2^40: what exp2 on another device may move the running sum by
FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 1},
    {"top_k": VOCAB + 7, "top_p": 0.999},
    {"top_k": 40, "top_p": 0.5, "min_p": 0.05},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a row and chunks a list, and scratch memory full of the greatest integers."""
    monkeypatch.setattr(greatest, "BLOCK_TOKENS", 128)
    monkeypatch.setattr(draws, "BLOCK_TOKENS", 128)
    monkeypatch.setattr(draws, "CHUNK_TOKENS", 256)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def by_kernel(device):
    """Where operations on tensors of this device go to their kernels."""
    return nullcontext() if device.type == "cuda" else kernels_forced()


def token_ids(logits, rows, device):
    """What the kernels choose; fails where torch on the CPU chooses otherwise."""
    with by_kernel(device):
        chosen = sample(logits.to(device), rows).token_ids
    assert chosen == sample(logits, rows).token_ids
    return chosen


@pytest.mark.parametrize("vocab", [1, 100, VOCAB])
def test_the_best_is_that_of_torch(vocab, device):
    logits = torch.randint(-3, 3, (12, vocab)).float()
    logits[1] = -0.0
    logits[1, vocab // 2 :] = 0.0
    logits[2] = -math.inf
    logits[3, vocab // 2] = math.inf
    logits[4, vocab - 1] = math.nan
    logits[5, vocab - 1] = -math.nan
    logits[6] = torch.tensor(-1).int().view(torch.float32)  # a NaN whose sign is set
    for given in (logits, logits.T.contiguous().T, logits[:1].expand(4, -1)):
        best, ids = greatest.best_kernel(given.to(device))
        expected = given.max(dim=-1)
        assert torch.equal(best.cpu().nan_to_num(nan=12345.0), expected.values.nan_to_num(nan=12345.0))
        assert ids.cpu().tolist() == expected.indices.tolist()


def test_draws_change_at_the_running_sums_and_nowhere_else(device):
    logits, temperature = torch.randn(VOCAB) * 2, 0.7
    running = (torch.softmax(logits.double() / temperature, -1).cumsum(-1)).tolist()
    best_share = torch.softmax(logits.double() / temperature, -1).max().item()
    edges = [0, 1, 126, 127, 128, 200, 298]
    margin = MARGIN / WEIGHT_ONE * best_share
    uniforms = [running[token] + side * margin for token in edges for side in (-1, 1)]
    asked = torch.tensor([[temperature, 0, 1.0, 0.0, uniform] for uniform in uniforms], dtype=torch.float64)
    batch = logits.expand(len(asked), -1).to(device)
    best, ids = greatest.best_kernel(batch)
    draws.draw_kernel(batch, best, ids, asked.to(device), ranks=False)
    assert ids.tolist() == [token + side for token in edges for side in (0, 1)]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_each_filter_keeps_what_the_reference_keeps(options, device):
    logits = torch.randn(2, VOCAB).mul(2).round(decimals=1)  # with ties
    rows = [SampleRow(seed=7, temperature=temperature, **options) for temperature in (0.5, 3.0)]
    token_ids(logits, rows, device)


def test_rows_of_one_batch_ask_for_what_they_like(device):
    logits = torch.randn(12, VOCAB) * torch.tensor([0.0, 1e-3, 1.0, 9.0]).repeat(3)[:, None]
    rows = [
        SampleRow(
            seed=random.getrandbits(64),
            position=random.randrange(10_000),
            temperature=random.choice([0.0, 1e-30, 0.3, 1.0, 5.0]),
            top_k=random.choice([0, 0, 2, 50, VOCAB - 1, VOCAB]),
            top_p=random.choice([1.0, 1.0, 1e-9, 0.3, 0.95]),
            min_p=random.choice([0.0, 0.0, 0.1, 1.0]),
        )
        for _ in range(12)
    ]
    together = token_ids(logits, rows, device)
    for index in range(1, 12, 5):
        assert token_ids(logits[index : index + 1], rows[index : index + 1], device) == [together[index]]


def test_ties_at_a_border_keep_the_lower_ids(device):
    ten = torch.full((VOCAB,), -1.0)
    ten[torch.arange(20, 300, 28)] = 0.0
    for options, kept in (({"top_k": 3}, {20, 48, 76}), ({"top_p": 0.35, "min_p": 1.0}, {20, 48, 76, 104})):
        rows = [SampleRow(position=p, temperature=0.01, **options) for p in range(4)]
        assert set(token_ids(ten.expand(4, -1), rows, device)) <= kept
    flat = [SampleRow(position=2, temperature=1.0, top_k=200, top_p=0.01 * kept) for kept in (1, 50)]
    assert token_ids(torch.zeros(2, VOCAB), flat, device)[0] < 2


def test_any_temperature_can_be_asked_for(device):
    temperatures = (5e-324, 1e-300, 1e300, math.inf)
    rows = [
        SampleRow(temperature=temperature, top_p=top_p)
        for temperature in temperatures
        for top_p in (1.0, 0.5)
    ]
    logits = torch.randn(len(rows), VOCAB)
    assert token_ids(logits, rows, device)[:4] == logits[:4].argmax(dim=-1).tolist()


def test_one_token_is_always_drawn(device):
    rows = [SampleRow(temperature=1.0, **options) for options in FILTERS]
    assert token_ids(torch.randn(len(rows), 1), rows, device) == [0] * len(rows)


def test_penalties_and_bans_come_before_the_draw(device):
    logits = torch.randn(4, VOCAB) * 3
    counts = torch.arange(VOCAB, dtype=torch.int32) % 3
    banned = tuple(logits[1].argsort(descending=True)[:3].tolist())
    rows = [
        SampleRow(temperature=1.0, frequency_penalty=0.7, output_token_counts=counts),
        SampleRow(temperature=0.4, top_k=4, banned_token_ids=banned),
        SampleRow(repetition_penalty=1.5, output_token_counts=counts, logprobs_count=2),
        SampleRow(),
    ]
    assert token_ids(logits, rows, device)[1] not in banned


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_next_token_are_named_and_the_rest_can_go_on(bad, device):
    logits = torch.randn(5, VOCAB)
    logits[1:4] = bad
    if not bad < 0:
        logits[1:4, 2:] = 0.0
    rows = [SampleRow(temperature=1.0, top_p=top_p, seed=4) for top_p in (0.9, 0.9, 1.0, 1.0, 1.0)]
    rows[3] = SampleRow()
    rows[4] = SampleRow(temperature=1.0, banned_token_ids=tuple(range(VOCAB)))
    expected, reasons = sample_each(logits, rows)
    with by_kernel(device):
        with pytest.raises(SampleError, match="row 1: its logits hold NaN or infinity; row 2:") as caught:
            sample(logits.to(device), rows)
        assert sample_each(logits.to(device), rows) == (expected, reasons)
    assert caught.value.reasons == reasons and set(reasons) == {1, 2, 3, 4}


def test_single_minus_infinities_are_never_drawn(device):
    logits = torch.full((2, VOCAB), -math.inf)
    logits[:, [4, 259]] = 1.0
    rows = [SampleRow(temperature=1.0), SampleRow(temperature=1.0, top_k=200, top_p=0.999)]
    assert set(token_ids(logits, rows, device)) <= {4, 259}


def test_no_rows_are_no_tokens(device):
    best, ids = greatest.best_kernel(torch.empty(0, VOCAB, device=device))
    assert best.shape == ids.shape == (0,)
