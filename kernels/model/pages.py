"""The ledger of who has which page of latents; a page holds 64 tokens.

Every page is in one of three states: free; cached (nobody uses it, but its content is known by hash and
may be used again); leased (one or more owners). `free + cached + leased == total`, always.
"""

import hashlib
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

PAGE_TOKENS = 64


class PagesExhausted(RuntimeError):
    """There are not enough free and cached pages: wait, or give the node more memory."""


class PagesLost(RuntimeError):
    """The ledger does not balance, a page leaked or returned twice; or another GPU keeps too many pages."""


def pages_for(tokens_count: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens_count // PAGE_TOKENS)


def page_hashes(token_ids: Sequence[int]) -> list[bytes]:
    """A hash for each full page of a prompt, which stands for the page and all before it."""
    tokens = np.asarray(token_ids, dtype=np.int32)
    digest, hashes = b"", []
    for begin in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        digest = hashlib.blake2b(
            digest + tokens[begin : begin + PAGE_TOKENS].tobytes(), digest_size=16
        ).digest()
        hashes.append(digest)
    return hashes


class FreePages:
    """Free pages as rows of neighbours: taking one looks at rows, of which there are few, not at pages."""

    def __init__(self, pages_count: int):
        self.pages_count = pages_count
        self._begins = [0] if pages_count else []  # sorted
        self._end_of = {begin: pages_count for begin in self._begins}
        self._begin_of = {end: begin for begin, end in self._end_of.items()}

    def pages(self) -> list[int]:
        """Every free page, in order."""
        return [page for begin in self._begins for page in range(begin, self._end_of[begin])]

    def add(self, page: int) -> None:
        """Put a page back, and join the rows that it lies between."""
        begin = self._begin_of.pop(page, page)
        end = self._end_of.pop(page + 1, page + 1)
        if end > page + 1:
            del self._begins[bisect_left(self._begins, page + 1)]
        if begin == page:
            insort(self._begins, page)
        self._end_of[begin], self._begin_of[end] = end, begin
        self.pages_count += 1

    def take(self, pages_count: int) -> list[int]:
        """The first row of neighbours that is long enough, else pieces of rows from the start."""
        row = next((begin for begin in self._begins if self._end_of[begin] - begin >= pages_count), None)
        if row is not None:
            return self._cut(row, pages_count)
        pages: list[int] = []
        while len(pages) < pages_count:
            begin = self._begins[0]
            pages += self._cut(begin, min(self._end_of[begin] - begin, pages_count - len(pages)))
        return pages

    def _cut(self, begin: int, pages_count: int) -> list[int]:
        cut, end = begin + pages_count, self._end_of.pop(begin)
        index = bisect_left(self._begins, begin)
        if cut == end:
            del self._begins[index], self._begin_of[end]
        else:
            self._begins[index], self._end_of[cut], self._begin_of[end] = cut, end, cut
        self.pages_count -= pages_count
        return list(range(begin, cut))


class PagePool:
    """The ledger: pure bookkeeping, no tensors, no clock."""

    def __init__(self, pages_count: int):
        self.pages_count = pages_count
        self._free = FreePages(pages_count)
        self._owners: Counter[int] = Counter()
        self._cached: OrderedDict[int, bytes] = OrderedDict()  # unowned, oldest first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def pages_free_count(self) -> int:
        """Pages that hold nothing."""
        return self._free.pages_count

    @property
    def pages_cached_count(self) -> int:
        """Pages that nobody uses but whose content can be found by hash."""
        return len(self._cached)

    @property
    def pages_leased_count(self) -> int:
        """Pages that have at least one owner."""
        return len(self._owners)

    @property
    def pages_available_count(self) -> int:
        """Pages that could be leased now."""
        return self._free.pages_count + len(self._cached)

    def lease(self, pages_count: int) -> list[int]:
        """Fresh pages for one owner, in a row where such a row is free; raises PagesExhausted."""
        if pages_count > self.pages_available_count:
            raise PagesExhausted(
                f"{pages_count} pages wanted, {self.pages_available_count} of {self.pages_count} left"
            )
        while self._free.pages_count < pages_count:
            self._evict_oldest()
        pages = self._free.take(pages_count)
        self._owners.update(pages)
        return pages

    def lease_cached(self, hashes: Sequence[bytes]) -> list[int]:
        """One more owner for the pages of the longest known prefix of `hashes`."""
        pages = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._cached.pop(page, None)
            self._owners[page] += 1
            pages.append(page)
        return pages

    def remember(self, page: int, digest: bytes) -> None:
        """Name the content of a leased page, so that it can be shared and outlive its owner."""
        if digest not in self._page_of and page not in self._hash_of:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """One owner less for each page; raises PagesLost for a page that has none.

        The last page goes first, and so is evicted first: without its beginning a prefix cannot be found.
        """
        for page in reversed(pages):
            if page not in self._owners:
                raise PagesLost(f"page {page} was returned, but nobody holds it")
            self._owners[page] -= 1
            if self._owners[page] == 0:
                del self._owners[page]
                self._retire(page)

    def check(self) -> None:
        """Raises PagesLost, showing all three counts, if the books do not balance."""
        free, cached, leased = self.pages_free_count, self.pages_cached_count, self.pages_leased_count
        every = set(self._free.pages()) | set(self._cached) | set(self._owners)
        if free + cached + leased != self.pages_count or len(every) != self.pages_count:
            raise PagesLost(f"{free} free + {cached} cached + {leased} leased != {self.pages_count} pages")

    def _retire(self, page: int) -> None:
        if page in self._hash_of:
            self._cached[page] = self._hash_of[page]
        else:
            self._free.add(page)

    def _evict_oldest(self) -> None:
        page, digest = self._cached.popitem(last=False)
        del self._page_of[digest], self._hash_of[page]
        self._free.add(page)
