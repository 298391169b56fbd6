"""Requests join and leave between steps, in the order they became complete."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from decode.batcher import DecodeBatcher, split_evenly


@dataclass(eq=True, frozen=True)
class Request:
    """Stands for a decode request; equal ones are still two."""

    name: str


def names(requests) -> str:
    return "".join(request.name for request in requests)


def counts(batcher) -> tuple[int, int]:
    return batcher.requests_running_count, batcher.requests_waiting_count


def test_requests_join_in_order_as_places_become_free():
    batcher = DecodeBatcher(requests_max=2)
    requests = [Request(name) for name in "abcd"]
    assert batcher.next_batch() == []
    batcher.admit(requests)
    assert counts(batcher) == (0, 4)
    assert names(batcher.next_batch()) == "ab"
    assert names(batcher.next_batch()) == "ab"
    assert counts(batcher) == (2, 2)
    batcher.remove(requests[:1])
    assert names(batcher.next_batch()) == "bc"
    batcher.remove(requests[1:3])
    assert names(batcher.next_batch()) == "d"
    assert names(batcher.everyone()) == "d"


def test_a_request_may_leave_while_it_waits():
    batcher = DecodeBatcher(requests_max=1)
    requests = [Request(name) for name in "abc"]
    batcher.admit(requests)
    batcher.next_batch()
    batcher.remove([requests[1]])
    assert names(batcher.everyone()) == "ac"
    assert counts(batcher) == (1, 1)


def test_suspects_take_one_step_alone_each():
    batcher = DecodeBatcher(requests_max=3)
    requests = [Request(name) for name in "abcd"]
    batcher.admit(requests)
    batcher.suspect(batcher.next_batch())
    assert names(batcher.next_batch()) == "a"
    assert counts(batcher) == (3, 1)
    batcher.remove(requests[:2])
    assert [names(batcher.next_batch()) for _ in range(2)] == ["c", "cd"]


def test_a_request_that_looks_like_another_is_not_taken_for_it():
    batcher = DecodeBatcher(requests_max=2)
    twins = [Request("a"), Request("a")]
    batcher.admit(twins)
    batcher.next_batch()
    batcher.remove([twins[1]])
    assert batcher.next_batch()[0] is twins[0]


def test_a_batch_is_the_callers_own():
    batcher = DecodeBatcher(requests_max=2)
    batcher.admit([Request("a")])
    batcher.next_batch().clear()
    assert names(batcher.next_batch()) == "a"


@given(st.integers(1, 100), st.integers(1, 5), st.integers(1, 8))
def test_parts_are_near_equal_and_none_is_too_small(count, parts_count, size_min):
    batch = list(range(count))
    parts = split_evenly(batch, parts_count, size_min)
    sizes = [len(part) for part in parts]
    assert [request for part in parts for request in part] == batch
    assert 1 <= len(parts) <= parts_count
    assert len(parts) == 1 or min(sizes) >= size_min
