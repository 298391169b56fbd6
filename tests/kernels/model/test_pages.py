"""The ledger of pages: it always balances, prefers rows, shares by content and forgets the oldest first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kernels.model.pages import (
    PAGE_TOKENS,
    FreePages,
    PagePool,
    PagesExhausted,
    PagesLost,
    page_hashes,
    pages_for,
)

PAGES = 12
PROMPTS = [[f"{name}{index}".encode() for index in range(5)] for name in "abc"]


class Ledger(RuleBasedStateMachine):
    """Owners lease, name, share and return pages in any order; a plain model says who has what."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    def owned(self) -> set[int]:
        return {page for pages in self.held for page in pages}

    @rule(count=st.integers(0, PAGES + 1))
    def lease(self, count):
        available = PAGES - len(self.owned())
        if count > available:
            with pytest.raises(PagesExhausted, match=f"{available} of {PAGES} left"):
                self.pool.lease(count)
            return
        free_before = self.pool.pages_free_count
        pages = self.pool.lease(count)
        assert len(set(pages)) == count
        assert not set(pages) & self.owned(), "a page was given away twice"
        if count <= free_before:
            assert not set(pages) & set(self.content), "a cached page was given away while others were free"
        for page in pages:
            self.content.pop(page, None)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), prompt=st.sampled_from(PROMPTS))
    def remember(self, data, prompt):
        pages = data.draw(st.sampled_from(self.held))
        for page, digest in zip(pages, prompt, strict=False):
            self.pool.remember(page, digest)
            if digest not in self.content.values() and page not in self.content:
                self.content[page] = digest

    @rule(prompt=st.sampled_from(PROMPTS), length=st.integers(0, 5))
    def share(self, prompt, length):
        pages = self.pool.lease_cached(prompt[:length])
        assert [self.content.get(page) for page in pages] == prompt[: len(pages)]
        if len(pages) < length:
            assert prompt[len(pages)] not in self.content.values(), "a known page was not found"
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(pages)

    @invariant()
    def balances(self):
        pool, owned = self.pool, self.owned()
        assert pool.pages_free_count + pool.pages_cached_count + pool.pages_leased_count == PAGES
        assert pool.pages_leased_count == len(owned)
        assert pool.pages_cached_count == len(set(self.content) - owned)
        assert pool.pages_available_count == PAGES - len(owned)
        pool.check()


TestLedger = Ledger.TestCase


@given(st.lists(st.one_of(st.integers(0, 19), st.tuples(st.just("take"), st.integers(0, 6))), max_size=60))
def test_free_pages_are_rows_as_long_as_can_be(steps):
    free, expected = FreePages(20), set(range(20))
    for step in steps:
        if isinstance(step, int):
            if step not in expected:
                free.add(step)
                expected.add(step)
            continue
        count = step[1]
        if count > len(expected):
            continue
        rows = [row for row in range(20) if expected.issuperset(range(row, row + count))]
        taken = free.take(count)
        if count and rows:
            assert taken == list(range(rows[0], rows[0] + count)), "not the first row"
        assert len(set(taken)) == count and expected.issuperset(taken)
        expected.difference_update(taken)
        assert free.pages() == sorted(expected)
        assert free.pages_count == len(expected)


def scattered() -> tuple[PagePool, list[int]]:
    """Ten pages of which 1, 3, 4, 5 and 7 are free."""
    pool = PagePool(10)
    pages = pool.lease(10)
    pool.release([pages[index] for index in (7, 3, 1, 5, 4)])
    return pool, pages


def test_a_row_is_preferred_to_nearer_pieces():
    pool, _ = scattered()
    assert pool.lease(3) == [3, 4, 5]


def test_pieces_are_given_where_no_row_is_long_enough():
    pool, _ = scattered()
    assert sorted(pool.lease(4)) == [1, 3, 4, 5]
    assert pool.lease(1) == [7]


def test_an_untouched_pool_gives_rows_one_after_the_other():
    pool = PagePool(10)
    assert [pool.lease(3), pool.lease(3)] == [[0, 1, 2], [3, 4, 5]]


def test_a_shared_page_is_leased_until_its_last_owner_leaves():
    pool = PagePool(4)
    first = pool.lease(2)
    pool.remember(first[0], b"a")
    second = pool.lease_cached([b"a"])
    third = pool.lease_cached([b"a"])
    assert second == third == first[:1]
    for pages, leased in ((first, 1), (second, 1), (third, 0)):
        pool.release(pages)
        assert pool.pages_leased_count == leased
    assert (pool.pages_cached_count, pool.pages_free_count) == (1, 3)


def name_all(pool: PagePool, count: int, name: str) -> list[bytes]:
    """Lease, name and return some pages; their names."""
    pages, names = pool.lease(count), [f"{name}{index}".encode() for index in range(count)]
    for page, digest in zip(pages, names, strict=True):
        pool.remember(page, digest)
    pool.release(pages)
    return names


def known(pool: PagePool, names: list[bytes]) -> int:
    """How much of a prefix is still known; its pages stay where they are in the order of forgetting."""
    return next((index for index, digest in enumerate(names) if digest not in pool._page_of), len(names))


def test_the_oldest_prefix_is_forgotten_first_and_from_its_end():
    pool = PagePool(6)
    old, new = name_all(pool, 3, "old"), name_all(pool, 3, "new")
    for expected in ((2, 3), (1, 3), (0, 3), (0, 2)):
        pool.lease(1)
        assert (known(pool, old), known(pool, new)) == expected


def test_use_makes_a_prefix_young_again():
    pool = PagePool(4)
    first, second = name_all(pool, 2, "first"), name_all(pool, 2, "second")
    pool.release(pool.lease_cached(first))
    pool.lease(2)
    assert (known(pool, first), known(pool, second)) == (2, 0)


def test_free_pages_are_used_before_anything_is_forgotten():
    pool = PagePool(6)
    names = name_all(pool, 3, "kept")
    pool.lease(3)
    assert known(pool, names) == 3


def test_a_refused_lease_forgets_nothing():
    pool = PagePool(4)
    names = name_all(pool, 2, "kept")
    leased = pool.lease(1)
    with pytest.raises(PagesExhausted, match="4 pages wanted, 3 of 4 left"):
        pool.lease(4)
    assert known(pool, names) == 2
    pool.release(leased)
    pool.check()


def test_a_name_is_given_to_one_page_and_a_page_gets_one_name():
    pool = PagePool(3)
    pages = pool.lease(2)
    pool.remember(pages[0], b"a")
    pool.remember(pages[1], b"a")
    pool.remember(pages[0], b"b")
    pool.release(pages)
    assert (pool.pages_cached_count, pool.pages_free_count) == (1, 2)
    assert pool.lease_cached([b"b"]) == []


def test_a_page_returned_twice_is_lost():
    pool = PagePool(3)
    pages = pool.lease(2)
    pool.release(pages)
    with pytest.raises(PagesLost, match="nobody holds it"):
        pool.release(pages)


def test_books_that_do_not_balance_are_shown_with_all_counts():
    pool = PagePool(3)
    pool.lease(1)
    pool._owners.clear()
    with pytest.raises(PagesLost, match=r"2 free \+ 0 cached \+ 0 leased != 3"):
        pool.check()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2)])
def test_pages_for(tokens, pages):
    assert pages_for(tokens) == pages


@pytest.mark.parametrize(("tokens", "full"), [(0, 0), (63, 0), (64, 1), (127, 1), (128, 2)])
def test_only_full_pages_have_a_hash(tokens, full):
    assert len(page_hashes(range(tokens))) == full


def test_a_hash_stands_for_its_page_and_all_before_it():
    tokens = list(range(3 * PAGE_TOKENS))
    other = [tokens[0] + 1, *tokens[1:]]
    assert page_hashes(tokens)[:2] == page_hashes(tokens[: 2 * PAGE_TOKENS + 5])
    assert not set(page_hashes(tokens)) & set(page_hashes(other))
