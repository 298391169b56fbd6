"""From process to process on one GPU: the sender copies into a window that the receiver has mapped.

Each end has one window to send through, and cuts what it sends into chunks of its size: the sender fills it
and says "given", the receiver copies it out and says "taken", each when its GPU has done so. A window is not
freed, since the peer may still have it mapped; the next channel of this process uses it.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch

from kernels.transport.device_link import Tell
from kernels.transport.device_parts import cut
from kernels.transport.errors import (
    DeviceLinkFailed,
    DeviceTransferFailed,
    DeviceUnavailable,
    FrameMalformed,
    HelloRefused,
)
from kernels.transport.nccl import Posted, Stream, blaming, current_gpu, gpu_name, mark, on_gpu, runtime

WINDOW_BYTES = 32 << 20
HANDLE_BYTES = 64
GIVEN, TAKEN = "given", "taken"


class Memory(Protocol):
    """The memory of one GPU that processes share."""

    device: torch.device
    gpu: str

    def lease(self) -> tuple[torch.Tensor, bytes]:
        """A window of uint8 `[WINDOW_BYTES]`, and the handle by which another process maps it."""

    def give_back(self, window: torch.Tensor, handle: bytes) -> None:
        """Let another channel use a window."""

    def map(self, handle: bytes) -> torch.Tensor:
        """The window of another process."""

    def unmap(self, window: torch.Tensor) -> None:
        """Give up the window of another process."""

    def mark(self) -> Any:
        """A point after all work that the calling thread has given the GPU until now."""

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Any:
        """Copy each second into its first, after a point; what comes back has `query`, true once done."""

    def settle(self) -> None:
        """Wait for the copies that were begun."""


class CudaIpcLink:
    """Joins two processes on one GPU; raises DeviceUnavailable without one."""

    def __init__(self, memory: Memory | None = None):
        self._memory = CudaMemory() if memory is None else memory
        self.device = self._memory.device
        self._lock = threading.Lock()
        self._window: tuple[torch.Tensor, bytes] | None = None
        self._theirs: torch.Tensor | None = None
        self._their_handle = b""
        self._tell: Tell | None = None
        self._aborted = False
        self.given_count = self.taken_count = 0
        """Chunks that we put into our window, and that the peer has taken out of it."""
        self.their_given_count = self.their_taken_count = 0
        """The same for the peer's window."""

    def offer(self) -> dict:
        """Our GPU and the handle of our window."""
        with blaming(DeviceLinkFailed, "no window could be made on the GPU"):
            self._window = self._memory.lease()
        return {"gpu": self._memory.gpu, "handle": self._window[1]}

    def answer(self, offer: Any) -> dict:
        """The same of us; raises HelloRefused for another GPU or no handle."""
        self._accept(offer)
        return self.offer()

    def confirm(self, answer: Any) -> dict:
        """Nothing more; raises DeviceLinkFailed for another GPU or no handle."""
        try:
            self._accept(answer)
        except HelloRefused as error:
            raise DeviceLinkFailed(str(error)) from error
        return {}

    def open(self, confirmed: Any, tell: Tell) -> None:
        """Map the peer's window; raises DeviceLinkFailed."""
        self._tell = tell
        with blaming(DeviceLinkFailed, "the peer's window could not be mapped"), self._lock:
            if self._aborted:
                raise DeviceLinkFailed("the channel ended while its windows were mapped")
            self._theirs = self._memory.map(self._their_handle)

    def hear(self, told: Any) -> None:
        """Count what the peer has done; raises FrameMalformed."""
        if told == GIVEN and self.their_given_count == self.their_taken_count:
            self.their_given_count += 1
        elif told == TAKEN and self.taken_count < self.given_count:
            self.taken_count += 1
        else:
            raise FrameMalformed("a chunk is given or taken out of turn")

    def mark(self) -> Any:
        """A point after all work that the calling thread has given the GPU until now."""
        return self._memory.mark()

    def send(self, pieces: Sequence[torch.Tensor], after: Any) -> "Giving":
        """Send flat tensors through our window."""
        return Giving(self, chunks_of(pieces), after)

    def receive(self, pieces: Sequence[torch.Tensor], after: Any) -> "Taking":
        """Receive into flat tensors from the peer's window."""
        return Taking(self, chunks_of(pieces), after)

    def check(self) -> None:
        """Errors of the GPU show where copies are polled."""

    def abort(self) -> bool:
        """Wait for copies under way, and give up both windows."""
        with self._lock:
            self._aborted = True
            theirs, self._theirs = self._theirs, None
            window, self._window = self._window, None
        try:
            self._memory.settle()
            if theirs is not None:
                self._memory.unmap(theirs)
        except RuntimeError:
            return False
        if window is not None and self.taken_count == self.given_count:  # else the peer may read it yet
            self._memory.give_back(*window)
        return True

    def fill(self, chunk: Sequence[torch.Tensor], after: Any) -> Posted:
        """Begin to copy a chunk into our window."""
        with self._lock:
            if self._window is None:
                raise DeviceTransferFailed("the windows are given up")
            return self._copy([(room, piece) for room, piece in beside(self._window[0], chunk)], after)

    def empty(self, chunk: Sequence[torch.Tensor], after: Any) -> Posted:
        """Begin to copy a chunk out of the peer's window."""
        with self._lock:
            if self._theirs is None:
                raise DeviceTransferFailed("the windows are given up")
            return self._copy([(piece, room) for room, piece in beside(self._theirs, chunk)], after)

    def given(self) -> None:
        """Our window is full."""
        self.given_count += 1
        self._tell(GIVEN)

    def taken(self) -> None:
        """The peer's window is ours no more."""
        self.their_taken_count += 1
        self._tell(TAKEN)

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Posted:
        # tensors made in inference mode let nobody outside it write them, and the mode is a thread's own
        with blaming(DeviceTransferFailed, "the GPU refused a copy"), torch.inference_mode():
            return Posted(self._memory.copy(pairs, after))

    def _accept(self, offer: Any) -> None:
        match offer:
            case {"gpu": str() as gpu, "handle": bytes() as handle} if len(handle) == HANDLE_BYTES:
                self._their_handle = handle
            case _:
                raise HelloRefused("the peer offers no window on a GPU; connect by cuda-ipc://")
        if gpu != self._memory.gpu:
            raise HelloRefused("the peer uses another GPU; connect by nccl:// to that one")


class Passing:
    """One way of a transfer, chunk after chunk, one of them being copied."""

    def __init__(self, link: CudaIpcLink, chunks: deque[list[torch.Tensor]], after: Any):
        self._link = link
        self._chunks = chunks
        self._after = after
        self._copied: Posted | None = None


class Giving(Passing):
    """What is sent."""

    def is_done(self) -> bool:
        """Whether the peer has taken the last chunk; raises DeviceTransferFailed."""
        link = self._link
        if self._copied is not None and self._copied.is_done():
            self._copied = None
            link.given()
        if self._copied is not None or link.taken_count < link.given_count:
            return False
        if not self._chunks:
            return True
        self._copied = link.fill(self._chunks.popleft(), self._after)
        return False


class Taking(Passing):
    """What is received."""

    def is_done(self) -> bool:
        """Whether the last chunk is here; raises DeviceTransferFailed."""
        link = self._link
        if self._copied is not None and self._copied.is_done():
            self._copied = None
            link.taken()
        if self._copied is None and self._chunks and link.their_taken_count < link.their_given_count:
            self._copied = link.empty(self._chunks.popleft(), self._after)
        return self._copied is None and not self._chunks


class CudaMemory:
    """Memory of the GPU that this process uses; windows come from CUDA, not from torch's larger blocks."""

    _spare: ClassVar[list[tuple[torch.Tensor, bytes]]] = []
    _spare_lock = threading.Lock()

    def __init__(self) -> None:
        if runtime is None:
            raise DeviceUnavailable("cuda-ipc:// needs cupy; install the extra 'gpu', or use unix://")
        self.device = current_gpu("cuda-ipc")
        self.gpu = gpu_name(self.device)
        self._owned = Stream(non_blocking=True)
        self._stream = torch.cuda.ExternalStream(self._owned.ptr, device=self.device)

    def lease(self) -> tuple[torch.Tensor, bytes]:
        """A window of uint8 `[WINDOW_BYTES]`, and its handle."""
        with self._spare_lock:
            if self._spare:
                return self._spare.pop()
        with on_gpu(self.device):
            address = runtime.malloc(WINDOW_BYTES)
            return self._window_at(address), bytes(runtime.ipcGetMemHandle(address))

    def give_back(self, window: torch.Tensor, handle: bytes) -> None:
        """Let another channel of this process use a window."""
        with self._spare_lock:
            self._spare.append((window, handle))

    def map(self, handle: bytes) -> torch.Tensor:
        """The window of another process."""
        with on_gpu(self.device):
            return self._window_at(runtime.ipcOpenMemHandle(handle))

    def unmap(self, window: torch.Tensor) -> None:
        """Give up the window of another process."""
        with on_gpu(self.device):
            runtime.ipcCloseMemHandle(window.data_ptr())

    def mark(self) -> torch.cuda.Event:
        """A point after the work on the calling thread's current stream."""
        return mark(self.device)

    def copy(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        """Copy each second into its first, on a stream of its own."""
        with on_gpu(self.device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def settle(self) -> None:
        """Wait for the copies that were begun."""
        self._stream.synchronize()

    def _window_at(self, address: int) -> torch.Tensor:
        return torch.as_tensor(WindowArray(address), device=self.device)


class WindowArray:
    """Says to torch where a window is."""

    def __init__(self, address: int):
        self.__cuda_array_interface__ = {
            "shape": (WINDOW_BYTES,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def chunks_of(pieces: Sequence[torch.Tensor]) -> deque[list[torch.Tensor]]:
    """Flat tensors in portions that fill a window each, but for the last."""
    size_bytes = sum(piece.nbytes for piece in pieces)
    chunks: deque[list[torch.Tensor]] = deque()
    room_bytes = 0
    for piece in cut(pieces, [WINDOW_BYTES] * (size_bytes // WINDOW_BYTES)):
        if room_bytes == 0:
            chunks.append([])
            room_bytes = WINDOW_BYTES
        chunks[-1].append(piece)
        room_bytes -= piece.nbytes
    return chunks


def beside(
    window: torch.Tensor, chunk: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each piece of a chunk and its room in the window."""
    begin = 0
    for piece in chunk:
        yield window[begin : begin + piece.nbytes], piece
        begin += piece.nbytes
