"""Ragged attention of prompts against its reference in float64, alone and in company, poison all around."""

from itertools import accumulate
from typing import NamedTuple

import pytest
import torch

from kernels.ops.backend import IS_INTERPRETED, kernels_forced
from kernels.ops.mla_prefill import mla_prefill, mla_prefill_ragged, mla_prefill_ragged_reference
from kernels.ops.mla_prefill_kernel import mla_prefill_ragged_kernel

SCALE = 0.3

# By device: a GPU approximates exponentials (ex2.approx: 2 ulps), and adds in its own order. Sums have the
# same bounds in either type, since products of bfloat16 are exact in float32.
OUT_TOLERANCE = {
    "cpu": {torch.float32: 4e-6, torch.bfloat16: 1e-2},
    "cuda": {torch.float32: 1.6e-5, torch.bfloat16: 1e-2},
}
SUM_TOLERANCE = {"cpu": 4e-6, "cuda": 1.6e-5}
FULL = (16, 16, 16)  # content, rotary and value
PADDED = (20, 8, 12)
QUERIES = [1, 63, 0, 64, 65, 130, 2]
KEYS = [1, 63, 0, 64, 200, 197, 0]  # whole prompts, ends of longer ones, and queries that see nothing


class Prompts(NamedTuple):
    """The first arguments of `mla_prefill_ragged`."""

    queries: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor


def poisoned(tokens_count: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, and three of NaN after them."""
    rows = torch.full((tokens_count + 3, *shape), float("nan"), dtype=dtype)
    rows[:tokens_count] = torch.randn(tokens_count, *shape).to(dtype)
    return rows


def starts_of(counts: list[int], device: torch.device) -> torch.Tensor:
    """Where each request begins, and where the last one ends."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


def drawn(queries, keys, dtype, device, sizes=FULL, heads_count=2) -> Prompts:
    """Prompts of so many queries and keys; keys and values are views of one tensor, as in the model."""
    content, rotary, value = sizes
    unfolded = poisoned(sum(keys), heads_count, content + value, dtype=dtype).to(device)
    return Prompts(
        poisoned(sum(queries), heads_count, content + rotary, dtype=dtype).to(device),
        unfolded[..., :content],
        poisoned(sum(keys), rotary, dtype=dtype).to(device),
        unfolded[..., content:],
        starts_of(queries, device),
        starts_of(keys, device),
    )


def attend(prompts: Prompts, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's outs and sums of all requests, without what comes after them."""
    tokens_count = len(prompts.queries) - 3
    results = mla_prefill_ragged_kernel(*prompts, SCALE, causal, tokens_count)
    return tuple(result[:tokens_count] for result in results)


def expected_of(prompts: Prompts, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference makes of them in float64."""
    tokens_count = len(prompts.queries) - 3
    wide = [part.cpu().double() for part in prompts[:4]]
    starts = [part.cpu() for part in prompts[4:]]
    results = mla_prefill_ragged_reference(*wide, *starts, SCALE, causal, tokens_count)
    return tuple(result[:tokens_count] for result in results)


def alone(prompts: Prompts, request: int) -> Prompts:
    """One of the requests, at the start of tensors of its own."""
    own = slice(*prompts.query_starts[request : request + 2].tolist())
    seen = slice(*prompts.key_starts[request : request + 2].tolist())
    rows = (prompts.queries[own], prompts.keys[seen], prompts.positions[seen], prompts.values[seen])
    ended = [torch.cat([part, part.new_full((3, *part.shape[1:]), float("nan"))]) for part in rows]
    bounds = (starts[request : request + 2] for starts in prompts[4:])
    return Prompts(*ended, *(starts - starts[0] for starts in bounds))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.bfloat16, FULL), (torch.float32, FULL), (torch.bfloat16, PADDED)],
    ids=["bfloat16", "float32", "padded"],
)
def test_ragged_prompts_are_those_of_the_reference(dtype, sizes, causal, device):
    prompts = drawn(QUERIES, KEYS, dtype, device, sizes)
    out, sums = (result.cpu() for result in attend(prompts, causal))
    expected_out, expected_sums = expected_of(prompts, causal)
    assert out.dtype == dtype and sums.dtype == torch.float32
    assert torch.allclose(out.double(), expected_out, atol=OUT_TOLERANCE[device.type][dtype], rtol=0)
    assert torch.allclose(sums.double(), expected_sums, atol=SUM_TOLERANCE[device.type], rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_request_has_the_same_bits_alone_and_in_company(dtype, causal, device):
    prompts = drawn([3, 65, 129], [70, 65, 200], dtype, device, heads_count=1)
    together = attend(prompts, causal)
    for request in range(3):
        own = slice(*prompts.query_starts[request : request + 2].tolist())
        for result, of_all in zip(attend(alone(prompts, request), causal), together, strict=True):
            assert torch.equal(result, of_all[own])


def test_a_row_has_the_same_bits_wherever_its_chunk_began(device):
    prompts = drawn([150], [150], torch.bfloat16, device, heads_count=1)
    whole, sums = attend(prompts, causal=True)
    starts = torch.tensor([0, 80], dtype=torch.int32, device=device)
    end = prompts._replace(queries=prompts.queries[70:], query_starts=starts)
    last, last_sums = attend(end, causal=True)
    assert torch.equal(last, whole[70:]) and torch.equal(last_sums, sums[70:])


def test_a_request_that_is_no_number_spoils_only_itself_and_of_itself_no_tile_before(device):
    prompts = drawn([130, 40], [130, 40], torch.float32, device, heads_count=1)
    before = attend(prompts, causal=True)
    for part in (prompts.keys, prompts.positions, prompts.values):
        part[128] = float("nan")
    for result, clean in zip(attend(prompts, causal=True), before, strict=True):
        assert torch.equal(result[:128], clean[:128]) and torch.equal(result[130:], clean[130:])
        assert result[128:130].isnan().all()


def test_scores_that_leave_the_range_of_exponentials_give_numbers(device):
    prompts = drawn([70], [70], torch.float32, device, heads_count=1)
    prompts.queries[:70] *= 200
    out, sums = (result.cpu().double() for result in attend(prompts, causal=True))
    expected_out, expected_sums = expected_of(prompts, causal=True)
    assert expected_sums.max() > 100
    assert torch.allclose(out, expected_out, atol=2e-3) and torch.allclose(sums, expected_sums, rtol=1e-5)


def test_the_reference_is_attention_of_one_chunk_of_each_prompt():
    prompts = drawn([70, 40], [134, 40], torch.float64, torch.device("cpu"))
    out, _ = mla_prefill_ragged(*prompts, SCALE, True, 70)
    for request in range(2):
        own = slice(*prompts.query_starts[request : request + 2].tolist())
        seen = slice(*prompts.key_starts[request : request + 2].tolist())
        position = prompts.positions[seen].unsqueeze(1).expand(-1, 2, -1)
        keys = torch.cat([prompts.keys[seen], position], dim=-1)
        chunk = mla_prefill(prompts.queries[own], keys, prompts.values[seen], SCALE)
        assert torch.allclose(out[own], chunk, atol=1e-6)  # whose scores pass through float32


def test_no_requests_are_no_rows(device):
    out, sums = mla_prefill_ragged_kernel(*drawn([], [], torch.bfloat16, device), SCALE, True, 0)
    assert len(out) == len(sums) == 3


@pytest.mark.skipif(not IS_INTERPRETED, reason="on a GPU the kernel runs anyway")
def test_where_kernels_run_the_operation_is_its_kernel():
    prompts = drawn([5], [7], torch.float32, torch.device("cpu"))
    with kernels_forced():
        out, sums = mla_prefill_ragged(*prompts, SCALE, True, 5)
    for result, own in zip((out, sums), attend(prompts, causal=True), strict=True):
        assert torch.equal(result[:5], own)


def test_shapes_that_do_not_fit_are_refused(device):
    prompts = drawn([5], [7], torch.float32, device)
    for wrong, message in (
        ({"values": prompts.values[1:]}, "tokens must be as many"),
        ({"positions": prompts.positions[1:]}, "tokens must be as many"),
        ({"queries": prompts.queries[..., 1:]}, "do not fit"),
        ({"queries": prompts.queries[:, 1:]}, "do not fit"),
        ({"positions": prompts.positions.T.contiguous().T}, "side by side"),
    ):
        with pytest.raises(ValueError, match=message):
            mla_prefill_ragged(*prompts._replace(**wrong), SCALE, True, 5)
