"""GPU to GPU by NCCL: a pair of communicators of two ranks for each channel, one for each direction.

Two ranks, so that one death is one death; two communicators, since what is posted to one runs in order, and a
large transfer each way would wait for the other. NCCL has no timeouts: who uses this aborts what hangs.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kernels.transport.device_link import Tell
from kernels.transport.errors import (
    ChannelError,
    DeviceLinkFailed,
    DeviceTransferFailed,
    DeviceUnavailable,
    FrameMalformed,
    HelloRefused,
)

try:
    from cupy.cuda import Stream, nccl, runtime
except ImportError:
    Stream = nccl = runtime = None

UNIQUE_ID_BYTES = 128
ABORT_TIMEOUT_S = 8.0
ABORT_POLL_S = 0.002

logger = logging.getLogger(__name__)


def gpu_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What NCCL and CUDA are to read as a process begins to use its GPU; what a user has set stays.

    A transfer holds some of the GPU's processors from when it is posted until it is over, and spins while the
    peer is late; a node has two communicators for each peer. With as many blocks (CTAs) each as NCCL chooses,
    those that wait could leave no processor to compute on. More are faster where peers are few. Beside a
    user's minimum there is no maximum of ours, to which NCCL would lower it.

    Streams share the GPU's work queues, eight by default: what is behind a transfer that waits waits too.
    CUDA reads this once: it belongs into the environment that a process starts with.
    """
    defaults = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    if "NCCL_MIN_CTAS" not in environment:
        defaults["NCCL_MAX_CTAS"] = "2"
    return {name: environment.get(name, number) for name, number in defaults.items()}


if nccl is not None:
    os.environ.update(gpu_settings(os.environ))


class NcclLink:
    """Joins this process's GPU and another one; raises DeviceUnavailable where there is none, or no NCCL."""

    def __init__(self) -> None:
        if nccl is None or not nccl.available:
            raise DeviceUnavailable("nccl:// needs cupy and NCCL; install the extra 'gpu', or use tcp://")
        self.device = current_gpu("nccl")
        self._gpu = gpu_name(self.device)
        self._ids: list[bytes] = []
        self._rank = 0
        self._lock = threading.Lock()
        self._ways: list[Way] = []
        self._aborted = False

    def offer(self) -> dict:
        """Our GPU."""
        return {"gpu": self._gpu}

    def answer(self, offer: Any) -> dict:
        """Our GPU; raises HelloRefused for an offer without one, or of the same GPU."""
        match offer:
            case {"gpu": str() as gpu}:
                pass
            case _:
                raise HelloRefused("the peer's hello is not one between GPUs by NCCL; connect by nccl://")
        if gpu == self._gpu:
            raise HelloRefused("both processes use the same GPU, which NCCL refuses; use cuda-ipc:// there")
        self._rank = 1
        return {"gpu": self._gpu}

    def confirm(self, answer: Any) -> dict:
        """The ids of both communicators, the first of which carries what we send.

        Not made for a peer that may never come: NCCL keeps a thread and a socket for each until both have.
        """
        with blaming(DeviceLinkFailed, "NCCL gave no id for a communicator"):
            self._ids = [nccl.get_unique_id() for _ in range(2)]
        return {"ids": self._ids}

    def open(self, confirmed: Any, tell: Tell) -> None:
        """Make both communicators, and a first transfer on each; waits for the peer without end."""
        if confirmed is not None:
            self._ids = ids_of(confirmed)
        with blaming(DeviceLinkFailed, "NCCL could not join the GPUs"), on_gpu(self.device):
            for number, unique_id in enumerate(self._ids):
                way = self._join(unique_id)
                way.meet(sends=number == self._rank)

    def hear(self, told: Any) -> None:
        """NCCL needs no words; raises FrameMalformed."""
        raise FrameMalformed("a word to a link that knows none")

    def mark(self) -> torch.cuda.Event:
        """A point after the work on the calling thread's current stream."""
        return mark(self.device)

    def send(self, pieces: Sequence[torch.Tensor], after: Any) -> "Posted":
        """Post sends of flat tensors, in one group."""
        with self._posting():
            return self._ways[self._rank].send(pieces, after)

    def receive(self, pieces: Sequence[torch.Tensor], after: Any) -> "Posted":
        """Post receives into flat tensors, in one group."""
        with self._posting():
            return self._ways[1 - self._rank].receive(pieces, after)

    def check(self) -> None:
        """Raises DeviceTransferFailed where NCCL has met an error by itself."""
        with self._lock:
            ways = [] if self._aborted else self._ways
        with blaming(DeviceTransferFailed, "NCCL reports an error"):
            for way in ways:
                way.communicator.check_async_error()

    def abort(self) -> bool:
        """Abort both communicators at once: freeing the memory of one may wait for what runs on the other.

        True once the GPU is past all that was posted: cupy does not say whether NCCL could abort.
        """
        with self._lock:
            self._aborted = True
            ways = list(self._ways)
        threads = [threading.Thread(target=way.abort, daemon=True) for way in ways]
        for thread in threads:
            thread.start()
        end_s = time.monotonic() + ABORT_TIMEOUT_S
        for thread in threads:
            thread.join(max(end_s - time.monotonic(), 0))
        return all(way.is_over(end_s) for way in ways)

    def _join(self, unique_id: bytes) -> "Way":
        if self._aborted:  # whoever waits for a peer that has gone can be woken by nobody
            raise DeviceLinkFailed("the channel ended before its GPUs were joined")
        communicator = nccl.NcclCommunicator(2, unique_id, self._rank)
        way = Way(communicator, 1 - self._rank, self.device)
        with self._lock:
            if not self._aborted:
                self._ways.append(way)
                return way
        communicator.abort()
        raise DeviceLinkFailed("the channel ended while its GPUs were joined")

    @contextmanager
    def _posting(self) -> Iterator[None]:
        with self._lock:
            if self._aborted or len(self._ways) != 2:
                raise DeviceTransferFailed("the GPUs are not joined any more")
        with blaming(DeviceTransferFailed, "NCCL refused a transfer"), on_gpu(self.device):
            yield


class Way:
    """A communicator that is used in one direction, on a stream of its own."""

    def __init__(self, communicator: Any, peer: int, device: torch.device):
        self.communicator = communicator
        self._peer = peer
        self._owned = Stream(non_blocking=True)  # torch's own ones are few and shared
        self._stream = torch.cuda.ExternalStream(self._owned.ptr, device=device)
        self._device = device
        self._aborted = False

    def send(self, pieces: Sequence[torch.Tensor], after: torch.cuda.Event | None) -> "Posted":
        """Post sends of uint8 `[bytes]`, of each piece to the peer's piece of the same size."""
        return self._post(self.communicator.send, pieces, after)

    def receive(self, pieces: Sequence[torch.Tensor], after: torch.cuda.Event | None) -> "Posted":
        """Post receives into uint8 `[bytes]`."""
        return self._post(self.communicator.recv, pieces, after)

    def meet(self, sends: bool) -> None:
        """Move one byte, so that connections are made here and not under the first transfer."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        move = self.send if sends else self.receive
        move([byte], mark(self._device))
        self._stream.synchronize()

    def abort(self) -> None:
        """Abort the communicator, which may hang."""
        try:
            self.communicator.abort()
        except RuntimeError:
            logger.exception("NCCL could not abort a communicator")
            return
        self._aborted = True

    def is_over(self, end_s: float) -> bool:
        """Whether it is aborted and the GPU past all that was posted, for which it waits until `end_s`."""
        try:
            while self._aborted and not self._stream.query():
                if time.monotonic() >= end_s:
                    return False
                time.sleep(ABORT_POLL_S)
        except RuntimeError:
            logger.exception("the GPU does not say whether transfers are over")
            return False
        return self._aborted

    def _post(
        self, call: Callable[..., None], pieces: Sequence[torch.Tensor], after: torch.cuda.Event | None
    ) -> "Posted":
        if after is not None:
            self._stream.wait_event(after)
        nccl.groupStart()
        try:
            for piece in pieces:
                call(piece.data_ptr(), piece.nbytes, nccl.NCCL_UINT8, self._peer, self._stream.cuda_stream)
        finally:
            nccl.groupEnd()
        return Posted(self._stream.record_event())


class Posted:
    """A transfer, or a part of one, that is over when the stream has come past it."""

    def __init__(self, event: torch.cuda.Event):
        self._event = event

    def is_done(self) -> bool:
        """Whether the stream has come past it; raises DeviceTransferFailed."""
        with blaming(DeviceTransferFailed, "the GPU reports an error"):
            return self._event.query()


def ids_of(confirmed: Any) -> list[bytes]:
    """The ids of two communicators; raises DeviceLinkFailed."""
    match confirmed:
        case {"ids": [bytes() as first, bytes() as second]} if len(first) == len(second) == UNIQUE_ID_BYTES:
            return [first, second]
    raise DeviceLinkFailed(f"the peer gave no two ids of {UNIQUE_ID_BYTES} bytes")


def current_gpu(scheme: str) -> torch.device:
    """The GPU that this process uses; raises DeviceUnavailable."""
    if not torch.cuda.is_available():
        raise DeviceUnavailable(f"{scheme}:// needs an NVIDIA GPU, and this process sees none")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_name(device: torch.device) -> str:
    """The same for every process that uses this GPU, and for no other GPU anywhere."""
    return str(torch.cuda.get_device_properties(device).uuid)


def mark(device: torch.device) -> torch.cuda.Event:
    """A point after the work on the calling thread's current stream."""
    return torch.cuda.current_stream(device).record_event()


@contextmanager
def on_gpu(device: torch.device) -> Iterator[None]:
    """Both torch and cupy use `device` inside, in the calling thread."""
    runtime.setDevice(device.index)
    with torch.cuda.device(device):
        yield


@contextmanager
def blaming(error: type[ChannelError], what: str) -> Iterator[None]:
    """Name errors of libraries, whose words may hold paths and are kept as the cause alone."""
    try:
        yield
    except ChannelError:
        raise
    except RuntimeError as cause:
        raise error(f"{what} ({type(cause).__name__})") from cause
