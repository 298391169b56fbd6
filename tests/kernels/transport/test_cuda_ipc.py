"""Processes on one GPU: the windows between them, over ordinary memory; and the real thing where a GPU is."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from kernels.transport import cuda_ipc, device_wire
from kernels.transport.connect import LINKS, accepted, connect, listen, welcome
from kernels.transport.cuda_ipc import CudaIpcLink, chunks_of
from kernels.transport.errors import (
    ChannelTimeout,
    DeviceLinkFailed,
    DeviceTransferFailed,
    DeviceUnavailable,
    FrameMalformed,
    HelloRefused,
)
from kernels.transport.frame import FrameLimits
from tests.kernels.transport.conftest import SECRET, WAIT_S, Pair

WINDOW = 100


class Copied:
    """Done when it is asked for the second time."""

    def __init__(self, fails: bool):
        self._asked_count = 0
        self._fails = fails

    def query(self) -> bool:
        if self._fails:
            raise RuntimeError("CUDA error: an illegal memory access\n/a/path/in/its/words")
        self._asked_count += 1
        return self._asked_count > 1


class SharedMemory:
    """Windows that any link of this process can map, and how many are in use."""

    device = torch.device("cpu")
    windows: dict[bytes, torch.Tensor] = {}  # noqa: RUF012  emptied for each test
    mapped: list[torch.Tensor] = []  # noqa: RUF012
    spare: list[tuple[torch.Tensor, bytes]] = []  # noqa: RUF012

    def __init__(self, gpu: str = "one GPU"):
        self.gpu = gpu
        self.fails = self.settling_fails = False

    def lease(self) -> tuple[torch.Tensor, bytes]:
        if self.spare:
            return self.spare.pop()
        handle = bytes([len(self.windows)]) * cuda_ipc.HANDLE_BYTES
        self.windows[handle] = torch.full((cuda_ipc.WINDOW_BYTES,), 0xEE, dtype=torch.uint8)
        return self.windows[handle], handle

    def give_back(self, window: torch.Tensor, handle: bytes) -> None:
        self.spare.append((window, handle))

    def map(self, handle: bytes) -> torch.Tensor:
        if handle not in self.windows:
            raise RuntimeError("cudaErrorInvalidResourceHandle")
        self.mapped.append(self.windows[handle])
        return self.windows[handle]

    def unmap(self, window: torch.Tensor) -> None:
        self.mapped[:] = [mapped for mapped in self.mapped if mapped is not window]

    def mark(self) -> str:
        return "a mark"

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Copied:
        assert after == "a mark"
        for target, source in pairs:
            target.copy_(source)
        return Copied(self.fails)

    def settle(self) -> None:
        if self.settling_fails:
            raise RuntimeError("the GPU is lost")


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[CudaIpcLink]:
    """The links made meanwhile, over memory that needs no GPU."""
    made: list[CudaIpcLink] = []

    def make() -> CudaIpcLink:
        made.append(CudaIpcLink(SharedMemory()))
        return made[-1]

    monkeypatch.setitem(LINKS, "cuda-ipc", make)
    monkeypatch.setattr(cuda_ipc, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(device_wire, "WATCH_S", 0.01)
    for name, empty in (("windows", {}), ("mapped", []), ("spare", [])):
        monkeypatch.setattr(SharedMemory, name, empty)
    return made


@contextlib.contextmanager
def joined(folder: object) -> Iterator[Pair]:
    """Two ends of a channel, the hello behind them."""
    with contextlib.closing(listen(f"cuda-ipc://{folder}/s")) as listener:
        here = connect(listener.address, SECRET, "here")
        there = accepted(listener.accept(), listener.address)
    with contextlib.closing(here), contextlib.closing(there):
        welcome(there, there.receive(WAIT_S), SECRET, FrameLimits())
        yield Pair(here, there)
    for thread in [*here._threads, *there._threads]:
        thread.join(WAIT_S)  # it gives the windows back


@pytest.mark.parametrize(
    "sizes", [[1], [99], [100], [101], [350], [60, 60, 60], [100, 100], [0, 1, 0, 199, 5]], ids=str
)
def test_parts_cross_windows_of_any_number(links, tmp_path, sizes):
    parts = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    with joined(tmp_path) as pair:
        for _ in range(3):
            pair.here.send("parts", sizes, parts)
        pair.there.send("back", None, parts)
        for _ in range(3):
            frame = pair.there.receive(WAIT_S)
            assert all(torch.equal(got, given) for got, given in zip(frame.parts, parts, strict=True))
        frame = pair.here.receive(WAIT_S)
        assert all(torch.equal(got, given) for got, given in zip(frame.parts, parts, strict=True))
        pair.here.flush(WAIT_S)
        assert links[-1].their_taken_count == links[-2].taken_count == 3 * -(-sum(sizes) // WINDOW)


def test_a_part_goes_into_the_tensors_chosen(links, tmp_path):
    target = torch.zeros(250, dtype=torch.uint8)
    part = torch.randint(0, 256, (250,), dtype=torch.uint8)
    with joined(tmp_path) as pair:
        pair.here.send("part", None, [part])
        pair.there.receive(WAIT_S, lambda header: [target[:30], target[30:230], target[230:]])
    assert torch.equal(target, part)


def test_tensors_made_in_inference_mode_are_sent_and_filled_by_threads_outside_it(links, tmp_path):
    with joined(tmp_path) as pair:
        with torch.inference_mode():
            part = torch.randint(0, 256, (250,), dtype=torch.uint8)
            target = torch.zeros(250, dtype=torch.uint8)
            pair.here.send("part", None, [part])
            while pair.there._arriving is None:
                assert pair.there.receive_ready(lambda header: [target]) is None
        pair.there.receive(WAIT_S)
        pair.here.flush(WAIT_S)
    assert torch.equal(target, part)


def test_what_was_sent_may_change_only_when_the_peer_has_taken_it(links, tmp_path):
    with joined(tmp_path) as pair:
        pair.here.send("parts", None, [torch.zeros(WINDOW, dtype=torch.uint8)])
        with pytest.raises(ChannelTimeout):
            pair.here.flush(0.05)
        pair.there.receive(WAIT_S)
        pair.here.flush(WAIT_S)


def test_windows_are_unmapped_and_used_again_but_never_lost(links, tmp_path):
    for _ in range(3):
        with joined(tmp_path) as pair:
            pair.here.send("part", None, [torch.ones(3)])
            pair.there.receive(WAIT_S)
            pair.here.flush(WAIT_S)
    assert (len(SharedMemory.windows), len(SharedMemory.spare), SharedMemory.mapped) == (2, 2, [])


def test_a_window_that_the_peer_has_not_emptied_is_used_no_more(links):
    link = CudaIpcLink(SharedMemory())
    link.confirm(link.offer())
    link.open(None, lambda told: None)
    link.given()
    assert link.abort()
    assert SharedMemory.spare == []


def test_an_error_of_the_gpu_is_named_without_its_words(links, tmp_path):
    with joined(tmp_path) as pair:
        links[-1]._memory.fails = True
        pair.here.send("part", None, [torch.ones(3)])
        with pytest.raises(DeviceTransferFailed, match=r"the GPU reports an error \(RuntimeError\)$"):
            pair.there.receive(WAIT_S)


def test_a_gpu_that_cannot_be_settled_keeps_its_windows(links):
    link = CudaIpcLink(SharedMemory())
    link.offer()
    link._memory.settling_fails = True
    assert not link.abort()
    assert SharedMemory.spare == []


@pytest.mark.parametrize(
    ("offer", "said"),
    [
        (None, "offers no window"),
        ({"gpu": "one GPU"}, "offers no window"),
        ({"gpu": "one GPU", "handle": b"short"}, "offers no window"),
        ({"gpu": "one GPU", "handle": "x" * 64}, "offers no window"),
        ({"gpu": 5, "handle": bytes(64)}, "offers no window"),
        ({"gpu": "another GPU", "handle": bytes(64)}, "another GPU"),
    ],
)
def test_an_offer_of_no_use_is_refused(links, offer, said):
    with pytest.raises(HelloRefused, match=said):
        CudaIpcLink(SharedMemory()).answer(offer)
    link = CudaIpcLink(SharedMemory())
    link.offer()
    with pytest.raises(DeviceLinkFailed, match=said):
        link.confirm(offer)


def test_a_window_that_cannot_be_mapped_is_named(links):
    link = CudaIpcLink(SharedMemory())
    link.answer({"gpu": "one GPU", "handle": b"\xff" * 64})
    with pytest.raises(DeviceLinkFailed, match="could not be mapped"):
        link.open({}, print)


@pytest.mark.parametrize("told", ["taken", "anything", None, 5])
def test_words_out_of_turn_are_malformed(links, told):
    link = CudaIpcLink(SharedMemory())
    with pytest.raises(FrameMalformed):
        link.hear(told)
    link.hear("given")
    with pytest.raises(FrameMalformed):
        link.hear("given")


def test_nothing_is_copied_once_the_link_has_ended(links):
    link = CudaIpcLink(SharedMemory())
    link.offer()
    assert link.abort() and link.abort()
    for work in (link.send([torch.ones(3, dtype=torch.uint8)], "a mark"),):
        with pytest.raises(DeviceTransferFailed):
            work.is_done()
    with pytest.raises(DeviceLinkFailed):
        link.open(None, print)


def test_chunks_fill_windows(monkeypatch):
    monkeypatch.setattr(cuda_ipc, "WINDOW_BYTES", 10)
    pieces = torch.arange(35, dtype=torch.uint8).split([4, 21, 10])
    chunks = [torch.cat(chunk).tolist() for chunk in chunks_of(pieces)]
    assert [len(chunk) for chunk in chunks] == [10, 10, 10, 5]
    assert [number for chunk in chunks for number in chunk] == list(range(35))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_address_says_so(tmp_path):
    for use in (listen, lambda address: connect(address, SECRET, "me")):
        with pytest.raises(DeviceUnavailable, match=r"cuda-ipc:// needs"):
            use(f"cuda-ipc://{tmp_path}/s")


CHILD = """
import sys, torch
from kernels.transport.connect import connect
channel = connect(sys.argv[1], "a secret of the tests", "child")
frame = channel.receive(60)
channel.send("back", None, [frame.parts[0].flip(0), memoryview(b"beside")])
channel.flush(60)
channel.receive(60)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or cuda_ipc.runtime is None, reason="needs a GPU and cupy")
def test_two_processes_on_one_gpu(tmp_path):
    sizes = [0, 5, cuda_ipc.WINDOW_BYTES + 7, 3 * cuda_ipc.WINDOW_BYTES]
    given = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, device="cuda")
    with contextlib.closing(listen(f"cuda-ipc://{tmp_path}/s")) as listener:
        child = subprocess.Popen([sys.executable, "-c", CHILD, listener.address])
        end_s = time.monotonic() + 60
        while (sock := listener.accept()) is None:
            assert time.monotonic() < end_s and child.poll() is None
            time.sleep(0.05)
        there = accepted(sock, listener.address)
    with contextlib.closing(there):
        welcome(there, there.receive(60), SECRET, FrameLimits())
        there.send("given", None, [given])
        target = torch.zeros_like(given)
        frame = there.receive(60, lambda header: [*target.split(sizes), memoryview(bytearray(6))])
        assert torch.equal(target, given.flip(0))
        assert bytes(frame.parts[-1]) == b"beside"
        there.send("done")
        assert child.wait(60) == 0
