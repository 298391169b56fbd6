"""A channel between two GPUs: headers and small parts over a stream socket, large parts from GPU to GPU.

The header of a frame announces its parts on the device. The receiver's owner chooses tensors for them, and
the receiver answers "taken" with their sizes, or "refused"; only then do both ends post the transfer to the
link. So a busy receiver costs the sender's GPU nothing, what is refused never moves, and the parts go
straight to where they belong.
"""

import socket
import threading
from collections.abc import Sequence
from itertools import zip_longest

import torch

from kernels.transport.device_link import DeviceLink
from kernels.transport.device_parts import device_sizes, pour, split_chosen, wrap
from kernels.transport.device_wire import DeviceWire, Word
from kernels.transport.errors import ChannelClosed, ChannelStalled
from kernels.transport.frame import Body, ChooseBuffers, Frame, FrameLimits, Header, Part


class DeviceChannel(DeviceWire):
    """A stream channel that carries contiguous tensors of one GPU as parts too.

    Its owner uses it as any channel. What was given to `send` must stay unchanged until `flush`, and what was
    chosen to receive into is its owner's again when the frame is here whole, or when `close` has returned and
    the channel is quiet: tensors that nobody else holds are kept for so long, other memory its owner keeps.
    """

    carries_tensors = True

    def __init__(
        self,
        sock: socket.socket,
        link: DeviceLink,
        limits: FrameLimits | None = None,
        pending_bytes_max: int = 1 << 30,
    ):
        super().__init__(sock, link, limits, pending_bytes_max)
        self._sending = threading.Lock()  # headers go out in the order of their transfers
        self._arriving: Frame | None = None

    def send(self, kind: str, body: Body = None, parts: Sequence[Part] = ()) -> None:
        """Queue a frame and send what can go now; raises ChannelClosed, ChannelStalled, ValueError."""
        wrapped, views, tensors = wrap(body, parts)
        if any(tensor.device != self._link.device for tensor in tensors):
            raise ValueError(f"a part lies on another device than this channel's {self._link.device}")
        pieces = [tensor for tensor in tensors if tensor.nbytes]
        after = self._link.mark() if pieces else None
        if not pieces:
            with self._sending:
                super().send(kind, wrapped, views)
            self._mind()
            return
        with self._sending:
            self._check_room()
            transfer = self._transfers.announce(pieces, after)  # before the peer can answer
            try:
                super().send(kind, wrapped, views)
            except Exception:
                self._transfers.retract(transfer)
                raise
        self._mind()
        self._stirred.set()

    def push(self) -> bool:
        """Send what the peer takes now; True when nothing is left to send; raises ChannelClosed."""
        sent = super().push()
        self._turn()
        sent = sent and not self._transfers.sending
        self._mind()
        self._check_open()  # an end lets go of transfers too
        self._check_answered()
        return sent

    @property
    def has_pending(self) -> bool:
        """True while bytes wait for the peer to take them, or a GPU still reads what was sent."""
        return super().has_pending or self._transfers.sending

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait for the peer to take them, or that a GPU still reads."""
        return super().pending_bytes + self._transfers.unsent_bytes

    def _next_frame(self, choose_buffers: ChooseBuffers | None) -> Frame | None:
        if not self._greeted:
            return super()._next_frame(None)
        self._bell.hush()
        self._send_on()
        self._take_in()
        self._act()
        frame = self._arrived() or self._begin_next(choose_buffers)
        if frame is None and self._arriving is None and not self._aside and self._ending is not None:
            raise self._ending
        if self._aside and self._arriving is None:  # else the last of what arrives rings
            self._bell.ring()
        self._mind()
        return frame

    def _begin_next(self, choose_buffers: ChooseBuffers | None) -> Frame | None:
        """Give the oldest frame set aside its memory; the frame itself, unless parts of it are to come."""
        if self._arriving is not None or not self._aside:
            return None
        aside = self._aside.popleft()
        frame, tensors = self._chosen(aside.header, aside.parts, choose_buffers)
        with self._reading:
            self._aside_bytes -= aside.size_bytes
        sizes = [size for size in device_sizes(aside.header) if size]
        if not sizes:
            return frame
        if frame.refused:
            self._say(Word.REFUSED, None)
            return frame
        self._arriving = frame
        self._transfers.receive(tensors, sizes, self._link.mark())
        self._say(Word.TAKEN, [tensor.nbytes for tensor in tensors])
        self._stirred.set()
        self._act()
        return self._arrived()

    def _chosen(
        self, header: Header, parts: list[memoryview], choose_buffers: ChooseBuffers | None
    ) -> tuple[Frame, list[torch.Tensor]]:
        """The frame over the memory chosen for it, and where its parts on the device go."""
        if choose_buffers is None:
            views = iter(parts)
            chosen = [
                self._allocated(size) if there else next(views)
                for size, there in zip_longest(header.part_sizes, header.on_device, fillvalue=False)
            ]
            return Frame(header.kind, header.body, chosen), split_chosen(header, chosen)[1]
        chosen = choose_buffers(header)
        if chosen is None:
            return Frame(header.kind, header.body, [], refused=True), []
        views, tensors = split_chosen(header, chosen)
        pour(parts, views)
        return Frame(header.kind, header.body, list(chosen)), tensors

    def _allocated(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._link.device)

    def _arrived(self) -> Frame | None:
        """The frame whose parts on the device were awaited, once all of them are here."""
        if (
            self._arriving is None or self._transfers.receiving or self._ended
        ):  # an end lets go of transfers too
            return None
        frame, self._arriving = self._arriving, None
        return frame

    def _check_answered(self) -> None:
        if self._unanswered:
            raise ChannelClosed("the peer went away")

    def _check_room(self) -> None:
        if self._ending is not None:
            raise ChannelClosed("the peer went away")
        waiting_bytes = self._transfers.unsent_bytes
        if waiting_bytes > self.pending_bytes_max:
            self.end()
            raise ChannelStalled(f"{waiting_bytes} bytes on the device wait for {self.peer or 'the peer'}")
