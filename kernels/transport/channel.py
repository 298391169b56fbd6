"""What a connection offers, whatever carries it: the seam between the cluster and its wires."""

from collections.abc import Sequence
from typing import Protocol

from kernels.transport.frame import Body, ChooseBuffers, Frame, Part


class Channel(Protocol):
    """An ordered, two-way connection between two processes, one frame after the other."""

    carries_tensors: bool
    """Whether parts may be tensors on the device that it begins at."""

    is_quiet: bool
    """Whether no transfer touches memory that was sent or chosen any more, also not from a GPU."""

    peer: str
    """Name that the peer gave itself; empty before its hello."""

    def send(self, kind: str, body: Body = None, parts: Sequence[Part] = ()) -> None:
        """Queue a frame and send what the peer takes now; the parts must stay unchanged until flushed."""

    def push(self) -> bool:
        """Send what the peer takes now; True when nothing is left to send."""

    def flush(self, timeout_s: float) -> None:
        """Wait until everything queued has left; raises ChannelTimeout."""

    def receive_ready(self, choose_buffers: ChooseBuffers | None = None) -> Frame | None:
        """The next frame if it is here whole, else None; never waits."""

    def receive(self, timeout_s: float, choose_buffers: ChooseBuffers | None = None) -> Frame:
        """Wait for the next whole frame; raises ChannelTimeout."""

    def fileno(self) -> int:
        """Descriptor to wait on for reading."""

    def close(self) -> None:
        """End the channel; safe to call twice."""
