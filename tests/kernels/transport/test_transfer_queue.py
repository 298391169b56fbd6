"""The order of transfers: announced, answered, posted one at a time, and gone."""

import random

import pytest

from kernels.transport.transfer_queue import Stage, Transfer, TransferQueue


def transfer(size_bytes: int) -> Transfer:
    return Transfer([object()], size_bytes)


def queue_of(*sizes: int) -> tuple[TransferQueue, list[Transfer]]:
    queue, transfers = TransferQueue(), [transfer(size) for size in sizes]
    for each in transfers:
        queue.announce(each)
    return queue, transfers


def test_nothing_is_posted_before_the_peer_has_taken_it():
    queue, (first,) = queue_of(5)
    assert queue.post(0.0) is None
    queue.taken([2, 3])
    assert queue.post(1.5) is first
    assert (first.stage, first.posted_s, first.peer_sizes) == (Stage.POSTED, 1.5, [2, 3])


def test_one_is_posted_at_a_time_in_the_order_announced():
    queue, (first, second) = queue_of(1, 2)
    queue.taken([1])
    assert queue.post(0.0) is first
    queue.taken([2])
    assert queue.post(0.0) is None
    assert queue.posted is first
    queue.completed()
    assert queue.posted is None
    assert queue.post(0.0) is second


def test_one_that_is_refused_is_passed_over_also_while_another_is_posted():
    queue, (first, _, third) = queue_of(1, 2, 3)
    queue.taken([1])
    queue.post(0.0)
    queue.refused()
    queue.taken([3])
    assert (len(queue), queue.size_bytes) == (2, 4)
    queue.completed()
    assert queue.post(0.0) is third
    assert first is not third


def test_answers_to_nothing_and_of_other_sizes_are_errors():
    queue, _ = queue_of(4)
    with pytest.raises(ValueError, match="5 bytes were taken of a transfer of 4"):
        queue.taken([5])
    queue.taken([4])
    for answer in (lambda: queue.taken([4]), queue.refused):
        with pytest.raises(ValueError, match="answer to no transfer"):
            answer()
    with pytest.raises(ValueError, match="no transfer is posted"):
        queue.completed()


def test_only_what_is_posted_can_be_overdue():
    queue, _ = queue_of(1)
    assert not queue.is_overdue(1e9, 1.0)
    queue.taken([1])
    assert not queue.is_overdue(1e9, 1.0)
    queue.post(10.0)
    assert not queue.is_overdue(11.0, 1.0)
    assert queue.is_overdue(11.1, 1.0)
    queue.completed()
    assert not queue.is_overdue(1e9, 1.0)


def test_what_will_never_be_answered_is_dropped_and_the_rest_kept():
    queue, (first, *_) = queue_of(1, 2, 3)
    queue.taken([1])
    assert queue.drop_unanswered() == 2
    assert (len(queue), queue.size_bytes) == (1, 1)
    assert queue.post(0.0) is first


def test_one_can_be_taken_back_and_is_not_missed_where_it_has_gone():
    queue, (first, second) = queue_of(1, 2)
    queue.retract(second)
    queue.retract(second)
    assert (len(queue), queue.size_bytes) == (1, 1)
    queue.taken([1])
    assert queue.post(0.0) is first


def test_any_order_of_events_keeps_the_books():
    for _ in range(200):
        queue, waiting, taken, posted = TransferQueue(), [], [], None
        for _ in range(40):
            event = random.choice(["announce", "taken", "refused", "post", "completed"])
            if event == "announce":
                waiting.append(transfer(random.randint(1, 9)))
                queue.announce(waiting[-1])
            elif event == "taken" and waiting:
                taken.append(waiting.pop(0))
                queue.taken([taken[-1].size_bytes])
            elif event == "refused" and waiting:
                waiting.pop(0)
                queue.refused()
            elif event == "post":
                expected = taken.pop(0) if posted is None and taken else None
                assert queue.post(0.0) is expected
                posted = posted or expected
            elif event == "completed" and posted:
                queue.completed()
                posted = None
            left = [*waiting, *taken, *([posted] if posted else [])]
            assert queue.posted is posted
            assert (len(queue), queue.size_bytes) == (len(left), sum(each.size_bytes for each in left))
    queue.clear()
    assert (len(queue), queue.size_bytes) == (0, 0)
