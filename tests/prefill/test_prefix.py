"""A known prefix is used again, never its last token, and the ledger stays whole."""

import pytest

from decode.messages import SamplingParameters
from kernels.model.pages import PagePool, PagesExhausted
from prefill.messages import PrefillPrompt
from prefill.prefix import PrefixPages
from prefill.request import PrefillRequest

PAGES = 8


def request(token_ids) -> PrefillRequest:
    asked = PrefillPrompt("r", 1, tuple(token_ids), len(token_ids), SamplingParameters(), "memory://d")
    return PrefillRequest(asked, None, 0.0)


class Prompts:
    """Prefix pages over a small pool, and prompts for them."""

    def __init__(self):
        self.pool = PagePool(PAGES)
        self.prefix = PrefixPages(self.pool)

    def begin(self, token_ids) -> PrefillRequest:
        begun = request(token_ids)
        self.prefix.begin(begun)
        return begun

    def compute(self, token_ids) -> PrefillRequest:
        """Begin, remember and end a prompt; what it was."""
        request = self.begin(token_ids)
        self.prefix.remember(request)
        self.prefix.end(request)
        return request

    def counts(self) -> tuple[int, int, int]:
        self.pool.check()
        return self.pool.pages_free_count, self.pool.pages_cached_count, self.pool.pages_leased_count


@pytest.fixture
def prompts():
    return Prompts()


@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (64, 0), (65, 64), (128, 64), (129, 128), (200, 192)])
def test_a_repeated_prompt_finds_all_full_pages_but_that_of_its_last_token(prompts, tokens, cached):
    prompts.compute(range(tokens))
    again = prompts.begin(range(tokens))
    assert (again.cached_tokens_count, again.tokens_done_count) == (cached, cached)
    assert again.tokens_left_count == tokens - cached > 0
    assert len(again.pages) == -(-tokens // 64)


def test_prompts_share_as_much_as_they_have_in_common(prompts):
    first = prompts.begin(range(200))
    prompts.prefix.remember(first)
    second = prompts.begin([*range(130), *range(300, 400)])
    assert second.pages[:2] == first.pages[:2]
    assert not set(second.pages[2:]) & set(first.pages)
    prompts.prefix.end(first)
    assert prompts.counts() == (3, 1, 4)
    prompts.prefix.end(second)
    assert prompts.counts() == (5, 3, 0)


def test_what_was_not_remembered_is_not_found(prompts):
    prompts.prefix.end(prompts.begin(range(200)))
    assert prompts.counts() == (PAGES, 0, 0)
    assert prompts.begin(range(200)).cached_tokens_count == 0


def test_a_prompt_that_finds_no_room_leaves_the_ledger_as_it_was(prompts):
    prompts.compute(range(130))
    held = prompts.begin(range(1000, 1000 + 64 * 5))
    before = prompts.counts()
    with pytest.raises(PagesExhausted):
        prompts.begin([*range(128), *range(2000, 2000 + 64 * 2)])
    assert prompts.counts() == before == (1, 2, 5)
    prompts.prefix.end(held)
    assert prompts.begin([*range(128), *range(2000, 2000 + 64 * 2)]).cached_tokens_count == 128


def test_the_same_prompt_twice_at_once_is_remembered_once(prompts):
    both = [prompts.begin(range(128)) for _ in range(2)]
    for request in both:
        prompts.prefix.remember(request)
        prompts.prefix.end(request)
    assert prompts.counts() == (PAGES - 2, 2, 0)


def test_what_fits_is_what_the_whole_pool_holds(prompts):
    whole, too_long = (request(range(PAGES * 64 + more)) for more in (0, 1))
    assert whole.problem(PAGES, 1 << 20) is None
    assert "more than the" in too_long.problem(PAGES, 1 << 20)
    prompts.prefix.begin(whole)
    assert len(whole.pages) == PAGES
    prompts.prefix.end(whole)
    with pytest.raises(PagesExhausted):
        prompts.prefix.begin(too_long)


def test_an_ended_prompt_holds_nothing(prompts):
    request = prompts.compute(range(100))
    assert request.pages == []
    prompts.prefix.end(request)
    assert prompts.counts() == (PAGES - 1, 1, 0)
