"""Where a request's tokens lie in the pages of a node."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.model.latent_cache import LatentCache, LatentLayout, is_row, page_runs, slots_of
from kernels.model.pages import PAGE_TOKENS, PagesExhausted

DIM = 4
LAYOUT = LatentLayout(3, 1, torch.float32)
PAGE_BYTES = 2 * PAGE_TOKENS * DIM * 4


@st.composite
def spans(draw):
    """Some pages in any order, or in a row, and a span of tokens in them."""
    pages = draw(st.permutations(range(9)))[: draw(st.integers(1, 6))]
    if draw(st.booleans()):
        pages = list(range(pages[0], pages[0] + len(pages)))
    end = draw(st.integers(1, len(pages) * PAGE_TOKENS))
    return pages, draw(st.integers(0, end - 1)), end


def slow_slots(pages, begin, end):
    return [pages[token // PAGE_TOKENS] * PAGE_TOKENS + token % PAGE_TOKENS for token in range(begin, end)]


def as_list(slots):
    return list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots.tolist()


@given(spans())
def test_slots_are_those_of_the_tokens_in_order(span):
    assert as_list(slots_of(*span)) == slow_slots(*span)


@given(spans())
def test_runs_cover_the_same_slots_with_no_two_that_could_be_one(span):
    runs = page_runs(*span)
    assert [slot for run in runs for slot in as_list(run)] == slow_slots(*span)
    assert all(run.start < run.stop for run in runs)
    assert all(before.stop != after.start for before, after in pairwise(runs))


def test_a_row_of_pages_is_a_slice_and_anything_else_an_index():
    assert slots_of([4, 5, 6], 70, 190) == slice(4 * 64 + 70, 4 * 64 + 190)
    assert slots_of([4], 3, 5) == slice(259, 261)
    assert slots_of([], 0, 0) == slice(0, 0)
    assert isinstance(slots_of([5, 4], 0, 128), torch.Tensor)
    assert (is_row([3]), is_row([3, 4]), is_row([3, 5]), is_row([4, 3])) == (True, True, False, False)


def test_a_row_is_read_without_a_copy():
    cache = LatentCache(2, LAYOUT, 3 * PAGE_BYTES)
    view = cache.read(1, slots_of([1, 2], 0, 128))
    cache.latents[1, 64] = 7.0
    assert view[0].tolist() == [7.0] * DIM


@given(spans())
def test_what_is_written_is_read_and_nothing_else_is_touched(span):
    pages, begin, end = span
    cache = LatentCache(2, LAYOUT, 15 * PAGE_BYTES)
    cache.latents.fill_(float("nan"))
    latents = torch.randn(end - begin, DIM)
    slots = slots_of(pages, begin, end)
    index = torch.tensor(as_list(slots))
    cache.latents[1][index] = latents
    assert torch.equal(cache.read(1, slots), latents)
    assert torch.isfinite(cache.latents).all(dim=-1).sum() == end - begin


def test_the_budget_is_spent_in_whole_pages():
    cache = LatentCache(2, LAYOUT, 3 * PAGE_BYTES + PAGE_BYTES - 1)
    assert cache.page_bytes == PAGE_BYTES
    assert cache.pool.pages_count == 3
    assert cache.latents.shape == (2, 3 * PAGE_TOKENS, DIM)


def test_a_budget_below_one_page_is_refused_with_the_remedy():
    with pytest.raises(PagesExhausted, match=f"no page of {PAGE_BYTES} bytes: raise latents_bytes"):
        LatentCache(2, LAYOUT, PAGE_BYTES - 1)
