"""The suites of channels and of endpoints once more, over a device channel."""

import contextlib
import os
import time
from collections.abc import Iterator

import pytest

from kernels.transport.connect import LINKS, accepted, connect, welcome
from kernels.transport.frame import FrameLimits
from kernels.transport.sockets import Listener
from tests.kernels.transport import test_channels, test_endpoint
from tests.kernels.transport.conftest import SECRET, WAIT_S, Pair
from tests.kernels.transport.stand_in_link import StandInLink

OF_STREAMS = {
    # a hello without an offer
    "test_a_hello_is_the_first_frame",
    "test_who_breaks_the_protocol_loses_its_channel_alone",
    "test_a_peer_that_closes_inside_a_frame_is_named_and_told",
    # what the selector watches: here that is the channel's own affair
    "test_a_slow_reader_is_served_to_the_end",
    # descriptors go when the last thread has let go: below
    "test_a_hundred_peers_leave_no_descriptor_behind",
    "test_endpoints_leave_no_descriptor_behind",
    "test_closing_takes_along_who_has_only_just_come",
}

for suite in (test_channels, test_endpoint):
    for name in dir(suite):
        takes = getattr(getattr(suite, name), "__code__", None)
        if not name.startswith("test_") or name in OF_STREAMS or takes is None:
            continue
        if {"address", "pair"} & set(takes.co_varnames[: takes.co_argcount]):
            globals()[name] = getattr(suite, name)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(LINKS, "nccl", StandInLink)
    monkeypatch.setattr(StandInLink, "joints", {})
    return "nccl://127.0.0.1:0"


@pytest.fixture
def pair(listener: Listener) -> Iterator[Pair]:
    """Two ends of a channel, joined, so that nobody reads or sends for their owners; held by no endpoint."""
    here = connect(listener.address, SECRET, "here")
    there = accepted(listener.accept(), listener.address)
    with contextlib.closing(here), contextlib.closing(there):
        welcome(there, there.receive(WAIT_S), SECRET, FrameLimits())
        end_s = time.monotonic() + WAIT_S
        while not (here._link.opened and there._link.opened):
            assert time.monotonic() < end_s, "the GPUs were not joined"
            time.sleep(0.001)
        yield Pair(here, there)


def test_channels_leave_no_descriptor_behind(listener):
    def visit() -> None:
        here = connect(listener.address, SECRET, "guest")
        there = accepted(listener.accept(), listener.address)
        welcome(there, there.receive(WAIT_S), SECRET, FrameLimits())
        here.close()
        there.close()

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        visit()
    end_s = time.monotonic() + WAIT_S
    while len(os.listdir("/proc/self/fd")) != before:
        assert time.monotonic() < end_s, "descriptors are left"
        time.sleep(0.01)
