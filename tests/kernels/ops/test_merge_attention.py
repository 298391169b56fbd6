"""Merging attention: its identities, and a chunk over long cached context that is attended piece by piece."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops.merge_attention import merge_attention, merge_attention_reference
from kernels.ops.merge_attention_kernel import merge_attention_kernel
from kernels.ops.mla_prefill_kernel import mla_prefill_ragged_kernel
from tests.kernels.ops.test_mla_prefill_kernel import SCALE, drawn, expected_of, starts_of

OUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
SUM_TOLERANCE = 1e-5
NOTHING = float("-inf")
MERGES = [merge_attention_reference, merge_attention_kernel]


def part(tokens_count: int, dtype: torch.dtype, device: torch.device, size: int = 16):
    """One attention of two heads: its out and its sums."""
    out, sums = torch.randn(tokens_count, 2, size), torch.randn(tokens_count, 2) * 8
    return out.to(dtype).to(device), sums.to(device)


def exact(out_first, sums_first, out_second, sums_second):
    """The formula, in float64."""
    first, second = (
        (out.cpu().double(), sums.cpu().double().unsqueeze(-1).exp())
        for out, sums in ((out_first, sums_first), (out_second, sums_second))
    )
    total = first[1] + second[1]
    return (first[0] * first[1] + second[0] * second[1]) / total, total.squeeze(-1).log()


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("size", [16, 20])
@pytest.mark.parametrize("dtype", OUT_TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens_count", [0, 1, 16, 50])
def test_two_parts_are_one(tokens_count, dtype, size, merge, device):
    parts = (*part(tokens_count, dtype, device, size), *part(tokens_count, dtype, device, size))
    out, sums = (result.cpu().double() for result in merge(*parts))
    expected_out, expected_sums = exact(*parts)
    assert torch.allclose(out, expected_out, atol=OUT_TOLERANCE[dtype], rtol=OUT_TOLERANCE[dtype])
    assert torch.allclose(sums, expected_sums, atol=SUM_TOLERANCE)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", OUT_TOLERANCE, ids=str)
def test_a_part_of_nothing_is_not_read_and_changes_no_bit(dtype, merge, device):
    some, none = part(20, dtype, device), part(20, dtype, device)
    none[0].fill_(float("nan"))
    none[1].fill_(NOTHING)
    for merged in (merge(*some, *none), merge(*none, *some)):
        assert torch.equal(merged[0], some[0]) and torch.equal(merged[1], some[1])
    out, sums = merge(*none, *none)
    assert (out == 0).all() and (sums == NOTHING).all()


@pytest.mark.parametrize("merge", MERGES)
def test_in_place_the_first_part_becomes_the_whole(merge, device):
    first, second = part(20, torch.bfloat16, device), part(20, torch.bfloat16, device)
    expected = merge(*first, *second)
    merged = merge(*first, *second, in_place=True)
    for result, memory, apart in zip(merged, first, expected, strict=True):
        assert result.data_ptr() == memory.data_ptr() and torch.equal(memory, apart)


@pytest.mark.parametrize("merge", MERGES)
def test_a_row_has_the_same_bits_alone_and_what_is_no_number_spoils_only_itself(merge, device):
    parts = (*part(40, torch.float32, device), *part(40, torch.float32, device))
    together = merge(*parts)
    for result, of_all in zip(merge(*(tensor[33:34] for tensor in parts)), together, strict=True):
        assert torch.equal(result, of_all[33:34])
    parts[1][7] = float("nan")
    out, sums = merge(*parts)
    assert out[7].isnan().all() and sums[7].isnan().all()
    assert torch.equal(out[8:], together[0][8:]) and torch.equal(sums[:7], together[1][:7])


SUMS = st.one_of(st.just(NOTHING), st.floats(-1e4, 1e4, width=32))


@settings(max_examples=25)
@given(st.lists(st.tuples(SUMS, SUMS, SUMS), min_size=1, max_size=8))
def test_order_does_not_matter_and_nothing_leaves_the_range(sums):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = [torch.tensor(column, device=device).view(-1, 1) for column in zip(*sums, strict=True)]
    parts = [(torch.rand(len(sums), 1, 4, device=device), column) for column in columns]
    one_way = merge_attention_kernel(*merge_attention_kernel(*parts[0], *parts[1]), *parts[2])
    other_way = merge_attention_kernel(*parts[2], *merge_attention_kernel(*parts[1], *parts[0]))
    assert torch.allclose(one_way[0], other_way[0], atol=2e-3)  # a logarithm near 1e4 has steps of 1e-3
    assert torch.allclose(one_way[1], other_way[1], rtol=1e-6, atol=1e-5)
    assert (one_way[0] >= 0).all() and (one_way[0] <= 1.001).all()


def attend_in_pieces(prompts, cached_counts: list[int], piece_tokens: int, device: torch.device):
    """Chunks over their own keys, then over `piece_tokens` of each request's cached context at a time."""
    starts = prompts.key_starts.tolist()
    chunk_counts = prompts.query_starts.diff().tolist()
    cached = [slice(start, start + count) for start, count in zip(starts, cached_counts, strict=False)]

    def attend(spans: list[slice], causal: bool):
        parts = (torch.cat([tensor[span] for span in spans]) for tensor in prompts[1:4])
        key_starts = starts_of([span.stop - span.start for span in spans], device)
        arguments = (prompts.queries, *parts, prompts.query_starts, key_starts)
        results = mla_prefill_ragged_kernel(*arguments, SCALE, causal, max(chunk_counts))
        return tuple(result[: sum(chunk_counts)] for result in results)  # what comes after is anything

    spans = [slice(span.stop, span.stop + own) for span, own in zip(cached, chunk_counts, strict=True)]
    whole = attend(spans, causal=True)
    for begin in range(0, max(cached_counts), piece_tokens):
        spans = [
            slice(min(span.start + begin, span.stop), min(span.start + begin + piece_tokens, span.stop))
            for span in cached
        ]
        merge_attention_kernel(*whole, *attend(spans, causal=False), in_place=True)
    return whole


@pytest.mark.parametrize("dtype", OUT_TOLERANCE, ids=str)
def test_a_chunk_and_pieces_of_its_cached_context_are_causal_attention_of_the_whole(dtype, device):
    cached_counts, chunk_counts = [0, 200, 70], [20, 66, 1]
    keys = [cached + own for cached, own in zip(cached_counts, chunk_counts, strict=True)]
    prompts = drawn(chunk_counts, keys, dtype, device)
    out, sums = attend_in_pieces(prompts, cached_counts, 96, device)
    expected_out, expected_sums = expected_of(prompts, causal=True)
    assert torch.allclose(out.cpu().double(), expected_out, atol=2 * OUT_TOLERANCE[dtype])
    assert torch.allclose(sums.cpu().double(), expected_sums, atol=2 * SUM_TOLERANCE)


def test_with_pieces_of_a_fixed_size_a_request_has_the_same_bits_alone_and_in_company(device):
    prompts = drawn([5, 20], [105, 220], torch.bfloat16, device, heads_count=1)
    together = attend_in_pieces(prompts, [100, 200], 64, device)
    own = prompts._replace(query_starts=prompts.query_starts[:2], key_starts=prompts.key_starts[:2])
    for result, of_all in zip(attend_in_pieces(own, [100], 64, device), together, strict=True):
        assert torch.equal(result, of_all[:5])


def test_the_operation_refuses_what_it_cannot_merge(device):
    out, sums = part(6, torch.float32, device)
    with pytest.raises(ValueError, match="do not fit each other"):
        merge_attention(out, sums, out[1:], sums)
    with pytest.raises(ValueError, match="contiguous"):
        merge_attention(out, sums, out.transpose(0, 2).contiguous().transpose(0, 2), sums)
    merged, _ = merge_attention(out, sums, out, sums)
    assert torch.allclose(merged, out, atol=1e-6)
