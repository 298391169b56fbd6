"""One descriptor for a socket and a bell."""

import contextlib
import os
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernels.transport.doorbell import Doorbell


@pytest.fixture
def ends() -> Iterator[tuple[Doorbell, socket.socket]]:
    here, there = socket.socketpair()
    with contextlib.closing(Doorbell(here)) as bell, here, there:
        yield bell, there


def wakes(bell: Doorbell) -> bool:
    poller = select.poll()
    poller.register(bell, select.POLLIN)
    return bool(poller.poll(0))


def test_a_ring_lasts_until_it_is_hushed(ends):
    bell, _ = ends
    assert not wakes(bell)
    bell.ring()
    bell.ring()
    assert wakes(bell) and wakes(bell)
    bell.hush()
    assert not wakes(bell)
    bell.hush()


def test_the_socket_wakes_only_for_what_is_watched(ends):
    bell, there = ends
    there.send(b"1")
    assert wakes(bell)
    bell.watch(lambda: (False, False))
    assert not wakes(bell)
    bell.watch(lambda: (False, True))
    assert wakes(bell)
    bell.watch(lambda: (True, False))
    assert wakes(bell)


def test_the_end_of_an_unwatched_socket_is_no_news(ends):
    bell, there = ends
    bell.watch(lambda: (False, False))
    there.close()
    assert not wakes(bell)


def test_of_two_threads_the_later_goes_by_what_is_newer(ends):
    bell, there = ends
    wishes = [(True, False)]
    with ThreadPoolExecutor(1) as pool:
        with bell._lock:
            watching = pool.submit(bell.watch, lambda: wishes[-1])
            wishes.append((False, False))  # by a thread that has the lock
        watching.result()
    there.send(b"1")
    assert not wakes(bell)


def test_closed_it_has_no_descriptor_and_is_silent():
    here, there = socket.socketpair()
    with here, there:
        before = len(os.listdir("/proc/self/fd"))
        bell = Doorbell(here)
        bell.close()
        bell.close()
        bell.ring()
        bell.hush()
        bell.watch(lambda: (False, True))
        assert bell.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) == before
