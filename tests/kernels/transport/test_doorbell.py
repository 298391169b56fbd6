"""One descriptor for a socket and a bell."""

import contextlib
import os
import select
import socket
from collections.abc import Iterator

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
    bell.watch(False, False)
    assert not wakes(bell)
    bell.watch(False, True)
    assert wakes(bell)
    bell.watch(True, False)
    assert wakes(bell)


def test_the_end_of_an_unwatched_socket_is_no_news(ends):
    bell, there = ends
    bell.watch(False, False)
    there.close()
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
        bell.watch(False, True)
        assert bell.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) == before
