"""Chunks fill the budget, begin at page borders, and leave nobody waiting without end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.messages import SamplingParameters
from kernels.model.pages import PAGE_TOKENS
from prefill.batcher import PrefillBatcher
from prefill.messages import PRIORITY_S, PrefillPrompt
from prefill.request import PrefillRequest

lengths = st.one_of(st.integers(1, 200), st.integers(1, 1000))


def prompt(tokens_count: int, priority: int = 0, name: str = "r", cached: int = 0) -> PrefillRequest:
    asked = PrefillPrompt(
        name, 1, tuple(range(tokens_count)), tokens_count, SamplingParameters(), "memory://", priority
    )
    return PrefillRequest(asked, None, 0.0, cached_tokens_count=cached, tokens_done_count=cached)


def begun(batcher: PrefillBatcher, *requests: PrefillRequest) -> list[PrefillRequest]:
    for request in requests:
        batcher.add(request)
        batcher.begin(request)
    return list(requests)


def sizes(batcher: PrefillBatcher) -> list[int]:
    """Tokens of each chunk of one step."""
    chunks = batcher.next_batch()
    batcher.finish(chunks)
    return [chunk.tokens_count for chunk in chunks]


@given(
    st.lists(st.tuples(lengths, st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=16),
    st.integers(1, 700),
)
def test_every_prompt_is_computed_once_in_order_within_the_budget(prompts, budget):
    """Prompts arrive over time, some with a cached prefix; every step is looked at."""
    batcher = PrefillBatcher(budget, requests_max=64)
    budget = max(budget, PAGE_TOKENS)
    arrivals = [(arrival, prompt(tokens, cached=0)) for tokens, _, arrival in prompts]
    for (_, request), (tokens, pages, _) in zip(arrivals, prompts, strict=True):
        request.tokens_done_count = min(pages, (tokens - 1) // PAGE_TOKENS) * PAGE_TOKENS
    done = {id(request): request.tokens_done_count for _, request in arrivals}
    unserved: dict[int, int] = {}
    turns_max = -(-len(arrivals) // max(budget // PAGE_TOKENS - 1, 1))
    for step in range(5000):
        begun(batcher, *(request for arrival, request in arrivals if arrival == step))
        running = batcher.everyone()
        chunks = batcher.next_batch()
        if not chunks:
            assert not running
            if step > 6:
                break
            continue
        used = sum(chunk.tokens_count for chunk in chunks)
        left = sum(request.tokens_left_count for request in running)
        assert used <= budget
        assert used > budget - PAGE_TOKENS or used == left, "the budget was not used"
        for chunk in chunks:
            length = len(chunk.request.asked.token_ids)
            assert chunk.begin == done[id(chunk.request)] and chunk.begin % PAGE_TOKENS == 0
            assert chunk.end % PAGE_TOKENS == 0 or chunk.end == length
            assert chunk.begin < chunk.end <= length
            done[id(chunk.request)] = chunk.end
        served = {id(chunk.request) for chunk in chunks}
        assert len(served) == len(chunks)
        for request in running:
            unserved[id(request)] = 0 if id(request) in served else unserved.get(id(request), 0) + 1
            assert unserved[id(request)] <= turns_max, "a prompt starves"
        batcher.finish(chunks)
        ended = [chunk.request for chunk in chunks if chunk.is_last]
        assert batcher.everyone() == [request for request in running if request not in ended]
    assert all(done[id(request)] == len(request.asked.token_ids) for _, request in arrivals)
    assert batcher.tokens_waiting_count == 0


def test_a_budget_is_shared_equally_and_what_is_left_goes_to_the_first():
    batcher = PrefillBatcher(512, 8)
    begun(batcher, prompt(10_000), prompt(5000), prompt(3000))
    assert sizes(batcher) == [256, 128, 128]


def test_what_short_prompts_leave_is_used():
    batcher = PrefillBatcher(512, 8)
    begun(batcher, prompt(30), prompt(10_000), prompt(65))
    assert sizes(batcher) == [30, 384, 65]


@pytest.mark.parametrize("longs", [1, 8, 20])
def test_a_short_prompt_does_not_wait_for_long_ones(longs):
    batcher = PrefillBatcher(512, 64)
    begun(batcher, *(prompt(100_000) for _ in range(longs)))
    sizes(batcher)
    short = begun(batcher, prompt(60))[0]
    steps = 0
    while short.tokens_left_count:
        sizes(batcher)
        steps += 1
    assert steps <= -(-(longs + 1) // 7)


def test_a_long_prompt_does_not_wait_for_an_endless_stream_of_short_ones():
    batcher = PrefillBatcher(512, 64)
    long = begun(batcher, prompt(64 * 40))[0]
    for _ in range(40):
        begun(batcher, *(prompt(64) for _ in range(12)))
        sizes(batcher)
    assert long.tokens_left_count == 0
    assert batcher.requests_running_count > 64, "the test does not press the batcher"


def test_a_prompt_that_is_not_the_oldest_does_not_wait_for_them_either():
    batcher = PrefillBatcher(512, 64)
    _, second = begun(batcher, prompt(100_000), prompt(64 * 3))
    for _ in range(40):
        begun(batcher, *(prompt(64) for _ in range(7)))
        sizes(batcher)
    assert second.tokens_left_count == 0


def test_who_may_not_go_has_no_share_and_keeps_its_place():
    batcher = PrefillBatcher(512, 8)
    held, *_ = begun(batcher, prompt(1000), prompt(1000), prompt(1000))
    chunks = batcher.next_batch(lambda request: request is not held)
    assert [(chunk.request is held, chunk.tokens_count) for chunk in chunks] == [(False, 256)] * 2
    batcher.finish(chunks)
    assert batcher.next_batch()[0].request is held
    assert batcher.next_batch(lambda request: False) == []


def test_suspects_take_one_step_alone_each():
    batcher = PrefillBatcher(512, 8)
    requests = begun(batcher, *(prompt(1000, name=name) for name in "abc"))

    def step(may_go=lambda request: True):
        chunks = batcher.next_batch(may_go)
        batcher.finish(chunks)
        return "".join(chunk.request.asked.request_id for chunk in chunks)

    batcher.suspect(batcher.next_batch())
    requests += begun(batcher, prompt(1000, name="d"))
    assert step() == "a"
    batcher.remove(requests[1])
    assert step(lambda request: request is not requests[2]) == "ad"
    assert step() == "c"
    assert step() == "acd"


def test_higher_priority_first_then_the_older():
    batcher = PrefillBatcher(512, 64)
    for name, priority in (("a", 0), ("b", 2), ("c", 0), ("d", 2), ("e", -1)):
        batcher.add(prompt(10, priority, name))
    order = []
    while (request := batcher.next_waiting()) is not None:
        order.append(request.asked.request_id)
        batcher.begin(request)
    assert order == ["b", "d", "a", "c", "e"]


def test_a_prompt_of_low_priority_does_not_wait_for_an_endless_stream_of_higher_ones():
    batcher = PrefillBatcher(512, requests_max=1)
    low = prompt(10, name="low")
    batcher.add(low)
    for second in range(100):
        urgent = prompt(10, 1)
        urgent.arrived_s = float(second)
        batcher.add(urgent)
        following = batcher.next_waiting()
        batcher.begin(following)
        sizes(batcher)
        if following is low:
            break
    assert second == PRIORITY_S


def test_no_more_begin_than_there_are_places():
    batcher = PrefillBatcher(512, requests_max=2)
    for tokens in (64, 1000, 64):
        batcher.add(prompt(tokens))
    for _ in range(2):
        batcher.begin(batcher.next_waiting())
    assert batcher.next_waiting() is None
    assert (batcher.requests_running_count, batcher.requests_waiting_count) == (2, 1)
    assert batcher.tokens_waiting_count == 1128
    sizes(batcher)
    assert batcher.next_waiting() is not None


def test_a_prompt_may_leave_wherever_it_is():
    batcher = PrefillBatcher(512, 64)
    waiting, running = prompt(100), prompt(100)
    begun(batcher, running)
    batcher.add(waiting)
    for request in (waiting, running, running):
        batcher.remove(request)
    assert batcher.everyone() == []
    assert batcher.next_batch() == []


def test_many_tiny_prompts_fit_into_one_step():
    batcher = PrefillBatcher(512, 64)
    begun(batcher, *(prompt(20) for _ in range(40)))
    assert [len(sizes(batcher)) for _ in range(3)] == [25, 15, 0]


def test_a_step_takes_a_page_even_if_its_budget_is_less():
    batcher = PrefillBatcher(10, 64)
    begun(batcher, prompt(100), prompt(100))
    assert [sizes(batcher) for _ in range(5)] == [[64], [64], [36], [36], []]
