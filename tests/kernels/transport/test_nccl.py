"""NCCL: what is asked of the library, by a stand-in with its signatures; and the library itself on a GPU."""

import contextlib
import ctypes
import itertools
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from kernels.transport import nccl
from kernels.transport.connect import LINKS, accepted, connect, listen, welcome
from kernels.transport.errors import (
    ChannelClosed,
    DeviceLinkFailed,
    DeviceTransferFailed,
    DeviceUnavailable,
    FrameMalformed,
    HelloRefused,
)
from kernels.transport.frame import FrameLimits
from kernels.transport.nccl import NcclLink, Way
from tests.kernels.transport.conftest import SECRET, WAIT_S, Pair

UINT8 = 1


class Stream:
    """A CUDA stream in whose order calls are made, without a GPU."""

    pointers = itertools.count(1000)

    def __init__(self, non_blocking: bool):
        assert non_blocking
        self.ptr = next(self.pointers)


class ExternalStream:
    """Torch's view of a stream."""

    def __init__(self, pointer: int, device: torch.device):
        self.cuda_stream = pointer
        self.waited = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def record_event(self) -> SimpleNamespace:
        return SimpleNamespace(query=lambda: not Communicator.waiting_on(self.cuda_stream))

    def query(self) -> bool:
        return not Communicator.waiting_on(self.cuda_stream)

    def synchronize(self) -> None:
        Communicator.wait_for(self.cuda_stream)


class Communicator:
    """Both ranks of a communicator in one process: sends and receives of equal sizes meet in their order."""

    changed = threading.Condition()
    joined: dict = {}  # noqa: RUF012  emptied for each test
    posted: list = []  # noqa: RUF012

    def __init__(self, ranks_count: int, unique_id: bytes, rank: int):
        assert ranks_count == 2 and type(unique_id) is bytes and len(unique_id) == 128
        self.key, self.rank, self.aborted, self.async_error = unique_id, rank, False, False
        with self.changed:
            self.joined.setdefault(unique_id, set()).add(rank)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.joined[unique_id] == {0, 1}, WAIT_S)

    def send(self, address: int, count: int, kind: int, peer: int, stream: int) -> None:
        self._post("send", address, count, kind, peer, stream)

    def recv(self, address: int, count: int, kind: int, peer: int, stream: int) -> None:
        self._post("recv", address, count, kind, peer, stream)

    def check_async_error(self) -> None:
        if self.async_error:
            raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: /a/path in its words")

    def abort(self) -> None:
        with self.changed:
            self.aborted = True
            self.posted[:] = [post for post in self.posted if post[0] != self.key]
            self.changed.notify_all()

    def _post(self, role: str, address: int, count: int, kind: int, peer: int, stream: int) -> None:
        assert (kind, peer) == (UINT8, 1 - self.rank) and count > 0 and not self.aborted
        with self.changed:
            self.posted.append((self.key, role, address, count, stream))
            self._meet()
            self.changed.notify_all()

    def _meet(self) -> None:
        while True:
            of_ours = [post for post in self.posted if post[0] == self.key]
            send = next((post for post in of_ours if post[1] == "send"), None)
            receive = next((post for post in of_ours if post[1] == "recv"), None)
            if send is None or receive is None:
                return
            assert send[3] == receive[3], "sizes differ: NCCL would hang"
            ctypes.memmove(receive[2], send[2], send[3])
            self.posted.remove(send)
            self.posted.remove(receive)

    @classmethod
    def waiting_on(cls, stream: int) -> bool:
        return any(post[4] == stream for post in cls.posted)

    @classmethod
    def wait_for(cls, stream: int) -> None:
        with cls.changed:
            assert cls.changed.wait_for(lambda: not cls.waiting_on(stream), WAIT_S)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """NCCL, cupy and torch's CUDA as far as the link uses them; each link is another GPU."""
    gpus, ids = itertools.count(), itertools.count()
    groups = []
    library = SimpleNamespace(
        available=True,
        NCCL_UINT8=UINT8,
        NcclCommunicator=Communicator,
        groups=groups,
        get_unique_id=lambda: bytes([next(ids)]) * 128,
        groupStart=lambda: groups.append("start"),
        groupEnd=lambda: groups.append("end"),
    )
    monkeypatch.setattr(nccl, "nccl", library)
    monkeypatch.setattr(nccl, "Stream", Stream)
    monkeypatch.setattr(nccl, "current_gpu", lambda scheme: torch.device("cpu"))
    monkeypatch.setattr(nccl, "gpu_name", lambda device: f"GPU-{next(gpus)}")
    monkeypatch.setattr(nccl, "on_gpu", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(nccl, "mark", lambda device: "a mark")
    monkeypatch.setattr(torch.cuda, "ExternalStream", ExternalStream)
    monkeypatch.setattr(Communicator, "joined", {})
    monkeypatch.setattr(Communicator, "posted", [])
    return library


@contextlib.contextmanager
def joined() -> Iterator[Pair]:
    """Two ends of a channel, the hello behind them."""
    with contextlib.closing(listen("nccl://127.0.0.1:0")) as listener:
        here = connect(listener.address, SECRET, "here")
        there = accepted(listener.accept(), listener.address)
    with contextlib.closing(here), contextlib.closing(there):
        welcome(there, there.receive(WAIT_S), SECRET, FrameLimits())
        yield Pair(here, there)


@pytest.fixture
def pair(library: SimpleNamespace) -> Iterator[Pair]:
    """Two ends of a channel over that library."""
    with joined() as pair:
        yield pair


def test_tensors_cross_both_ways_cut_where_both_ends_need_it(pair, library):
    down, up = torch.randn(100), torch.randn(60)
    pair.here.send("down", None, [down[:30], down[30:]])
    pair.there.send("up", None, [up])
    target = torch.zeros(100)
    pair.there.receive(WAIT_S, lambda header: [target[:50], target[50:]])
    assert torch.equal(target, down)
    assert torch.equal(pair.here.receive(WAIT_S).parts[0].view(torch.float32), up)
    pair.here.flush(WAIT_S)
    pair.there.flush(WAIT_S)
    assert library.groups.count("start") == library.groups.count("end") == 8  # two to meet, two transfers


def test_each_direction_has_a_communicator_and_a_stream_of_its_own(pair):
    pair.here.send("one", None, [torch.ones(1)])
    pair.there.receive(WAIT_S)
    links = [pair.here._link, pair.there._link]
    keys = [[way.communicator.key for way in link._ways] for link in links]
    assert keys[0] == keys[1] and len(set(keys[0])) == 2
    assert [[way.communicator.rank for way in link._ways] for link in links] == [[0, 0], [1, 1]]
    assert len({way._owned.ptr for link in links for way in link._ways}) == 4
    assert all("a mark" in way._stream.waited for link in links for way in link._ways)


def test_an_error_of_the_library_is_named_without_its_words(pair):
    pair.here.send("one", None, [torch.ones(1)])
    pair.there.receive(WAIT_S)
    pair.here._link._ways[1].communicator.async_error = True
    with pytest.raises(DeviceTransferFailed, match=r"^NCCL reports an error \(RuntimeError\)$"):
        pair.here.receive(WAIT_S)
    pair.here._quiet.wait(WAIT_S)
    assert all(way.communicator.aborted for way in pair.here._link._ways)
    with pytest.raises(DeviceTransferFailed):
        pair.here._link.send([torch.ones(1, dtype=torch.uint8)], "a mark")


def test_a_communicator_that_comes_after_the_end_is_aborted(library):
    here, _, confirmed = agreed()
    here_opens = in_thread(lambda: raises_while_joined(here))
    while confirmed["ids"][0] not in Communicator.joined:
        time.sleep(0.001)
    assert here.abort()
    other = in_thread(lambda: Communicator(2, confirmed["ids"][0], 1))
    for thread in (here_opens, other):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert here._ways == []


def raises_while_joined(link: NcclLink) -> None:
    with pytest.raises(DeviceLinkFailed, match="ended while"):
        link.open(None, print)


def test_after_the_end_no_communicator_is_begun(library):
    link, _, _ = agreed()
    assert link.abort()
    with pytest.raises(DeviceLinkFailed, match="ended before"):
        link.open(None, print)
    assert Communicator.joined == {}


def test_an_abort_amid_the_first_meeting_leaves_the_second_communicator_unmade(library, monkeypatch):
    here, there, confirmed = agreed()
    meet, met = Way.meet, []

    def abort_amid(way: Way, sends: bool) -> None:
        met.append(way)
        assert here.abort() and there.abort()
        meet(way, sends)

    monkeypatch.setattr(Way, "meet", lambda way, sends: None if met else abort_amid(way, sends))
    monkeypatch.setattr(Communicator, "send", lambda *_: None)
    monkeypatch.setattr(Communicator, "recv", lambda *_: None)
    opening = [
        in_thread(lambda: opens_in_vain(here, None)),
        in_thread(lambda: opens_in_vain(there, confirmed)),
    ]
    for thread in opening:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert list(Communicator.joined) == confirmed["ids"][:1]


def opens_in_vain(link: NcclLink, confirmed: dict | None) -> None:
    with pytest.raises(DeviceLinkFailed):
        link.open(confirmed, print)


def agreed() -> tuple[NcclLink, NcclLink, dict]:
    """Two links that may open now, and what the first confirmed."""
    here, there = NcclLink(), NcclLink()
    return here, there, here.confirm(there.answer(here.offer()))


def in_thread(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def both_joined() -> list[NcclLink]:
    """Two links whose communicators have met."""
    here, there, confirmed = agreed()
    opening = in_thread(lambda: there.open(confirmed, print))
    here.open(None, print)
    opening.join(WAIT_S)
    return [here, there]


def receive_without_end(link: NcclLink) -> nccl.Posted:
    return link.receive([torch.zeros(1, dtype=torch.uint8)], "a mark")


def test_an_abort_ends_what_was_posted(library):
    link = both_joined()[0]
    posted = receive_without_end(link)
    assert link.abort() and posted.is_done()


def test_an_abort_that_fails_is_told(library, monkeypatch, caplog):
    def fail() -> None:
        raise RuntimeError("NCCL_ERROR_INTERNAL_ERROR")

    link = both_joined()[0]
    monkeypatch.setattr(link._ways[1].communicator, "abort", fail)
    assert not link.abort()
    assert link._ways[0].communicator.aborted
    assert "could not abort" in caplog.text


@pytest.mark.parametrize("passes", [True, False])
def test_an_abort_is_over_when_the_gpu_is_past_what_was_posted(library, monkeypatch, passes):
    """An abort that ended without a word leaves a receive running; it may end of itself a little later."""
    monkeypatch.setattr(nccl, "ABORT_TIMEOUT_S", WAIT_S if passes else 0.05)
    link = both_joined()[0]
    for way in link._ways:
        monkeypatch.setattr(way.communicator, "abort", lambda: None)
    posted = receive_without_end(link)
    if passes:
        threading.Timer(0.05, Communicator.posted.clear).start()
    assert link.abort() == passes == posted.is_done()


def test_a_gpu_that_does_not_answer_is_not_past_anything(library, monkeypatch):
    def fail() -> bool:
        raise RuntimeError("CUDA error: unspecified launch failure")

    link = both_joined()[0]
    monkeypatch.setattr(link._ways[0]._stream, "query", fail)
    assert not link.abort()


@pytest.mark.parametrize(
    "offer",
    [
        None,
        {"handle": bytes(64)},
        {"gpu": 1},
    ],
    ids=str,
)
def test_an_offer_of_no_use_is_refused(library, offer):
    with pytest.raises(HelloRefused):
        NcclLink().answer(offer)


@pytest.mark.parametrize(
    "confirmed",
    [
        {},
        {"ids": [bytes(128)]},
        {"ids": [bytes(128), bytes(127)]},
        {"ids": [bytes(128), "x" * 128]},
    ],
    ids=str,
)
def test_without_two_ids_nothing_is_joined(library, confirmed):
    link = NcclLink()
    link.answer({"gpu": "GPU-x"})
    with pytest.raises(DeviceLinkFailed, match="no two ids"):
        link.open(confirmed, print)
    assert Communicator.joined == {}


def test_two_processes_on_one_gpu_are_sent_to_another_scheme(library):
    link = NcclLink()
    with pytest.raises(HelloRefused, match="cuda-ipc://"):
        link.answer({"gpu": link._gpu})
    with pytest.raises(FrameMalformed):
        link.hear("anything")


def test_a_gpu_that_gives_no_id_is_named(library, monkeypatch):
    def none() -> bytes:
        raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR")

    monkeypatch.setattr(library, "get_unique_id", none)
    with joined() as pair:
        with pytest.raises(DeviceLinkFailed, match="no id"):
            pair.here.receive(WAIT_S)
        with pytest.raises(ChannelClosed):
            pair.there.receive(WAIT_S)
    assert Communicator.joined == {}


def test_no_id_is_made_for_a_peer_that_has_not_welcomed_us(library):
    with contextlib.closing(listen("nccl://127.0.0.1:0")) as listener:
        made = []
        library.get_unique_id = lambda: made.append(1) or bytes(128)
        connect(listener.address, SECRET, "me").close()
        there = accepted(listener.accept(), listener.address)
        with contextlib.closing(there):
            welcome(there, there.receive(WAIT_S), SECRET, FrameLimits())
            with pytest.raises(ChannelClosed):
                there.receive(WAIT_S)
        for thread in there._threads:
            thread.join(WAIT_S)
    assert (made, Communicator.joined) == ([], {})


def test_without_cupy_or_a_gpu_the_address_says_so(monkeypatch):
    monkeypatch.setattr(nccl, "nccl", None)
    for use in (listen, lambda address: connect(address, SECRET, "me")):
        with pytest.raises(DeviceUnavailable, match=r"nccl:// needs cupy and NCCL; install the extra 'gpu'"):
            use("nccl://127.0.0.1:0")
    assert LINKS["nccl"] is NcclLink
    if not torch.cuda.is_available():
        monkeypatch.setattr(nccl, "nccl", SimpleNamespace(available=True))
        with pytest.raises(DeviceUnavailable, match="needs an NVIDIA GPU"):
            NcclLink()


OURS = {"NCCL_MAX_CTAS": "2", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}


@pytest.mark.parametrize(
    ("set_by_user", "found"),
    [
        ({}, OURS),
        ({"NCCL_MAX_CTAS": "16"}, OURS | {"NCCL_MAX_CTAS": "16"}),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, OURS | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ({"NCCL_MIN_CTAS": "4"}, {"NCCL_MIN_CTAS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}),
    ],
    ids=str,
)
def test_transfers_leave_processors_to_compute_on_unless_the_user_says_otherwise(
    monkeypatch, set_by_user, found
):
    environment = dict(set_by_user)
    cupy = SimpleNamespace(Stream=Stream, nccl=SimpleNamespace(available=True), runtime=None)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cupy))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy)
    runpy.run_path(nccl.__file__)
    assert environment == found


def test_without_cupy_the_environment_stays_as_it_is(monkeypatch):
    environment: dict = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    runpy.run_path(nccl.__file__)
    assert environment == {}


needs_nccl = pytest.mark.skipif(
    not torch.cuda.is_available() or nccl.nccl is None or not nccl.nccl.available,
    reason="needs a GPU and NCCL",
)


def alone() -> Way:
    """A communicator of one rank, which is its own peer: all that one GPU allows."""
    communicator = nccl.nccl.NcclCommunicator(1, nccl.nccl.get_unique_id(), 0)
    return Way(communicator, 0, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
@needs_nccl
def test_a_gpu_sends_to_itself():
    way = alone()
    source = torch.randn(1 << 20, device="cuda").view(torch.uint8)
    target = torch.zeros_like(source)
    sizes = [1, 4095, source.nbytes - 4096]
    after = nccl.mark(source.device)
    nccl.nccl.groupStart()
    way.send(source.split(sizes), after)
    way.receive(target.split(sizes), after)
    nccl.nccl.groupEnd()
    posted = nccl.Posted(way._stream.record_event())
    way._stream.synchronize()
    assert posted.is_done()
    assert torch.equal(source, target)
    way.communicator.check_async_error()
    way.communicator.abort()


@pytest.mark.gpu
@needs_nccl
def test_a_link_offers_ids_and_names_its_gpu():
    link = NcclLink()
    ids = link.confirm({})["ids"]
    assert [len(unique_id) for unique_id in ids] == [128, 128] and ids[0] != ids[1]
    assert link.offer()["gpu"] == nccl.gpu_name(link.device) == NcclLink()._gpu
    assert link.abort()
