"""What joins two GPUs under a device channel: the seam between its order and the library that moves bytes."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Tell = Callable[[Any], None]
"""Says something, plain msgpack data, to the link at the peer's end."""


class Work(Protocol):
    """A transfer that was posted."""

    def is_done(self) -> bool:
        """Whether it is over at this end, and its memory free; never waits; raises DeviceTransferFailed."""


class DeviceLink(Protocol):
    """Moves tensors between this process's GPU and one peer's; at most one transfer each way at a time.

    Both ends give the same sizes in the same order. Who connects calls `offer`, who accepts `answer`, who
    connects `confirm`, then both `open`: neither before it has heard that the other is there. No two threads
    post or poll at once; `abort` may come at any time.
    """

    device: torch.device
    """Where the parts that it carries lie."""

    def offer(self) -> dict:
        """What the accepting end must know; goes with our hello."""

    def answer(self, offer: Any) -> dict:
        """Accept a peer's offer and say what it must know; raises HelloRefused for one of no use."""

    def confirm(self, answer: Any) -> dict:
        """What the accepting end must know once it has answered; raises DeviceLinkFailed."""

    def open(self, confirmed: Any, tell: Tell) -> None:
        """Join the peer, which `confirmed` where we accepted; may wait long; raises DeviceLinkFailed."""

    def hear(self, told: Any) -> None:
        """Take what the peer's link has told; raises FrameMalformed."""

    def mark(self) -> Any:
        """A point after all work that the calling thread has given the GPU until now."""

    def send(self, pieces: Sequence[torch.Tensor], after: Any) -> Work:
        """Send flat tensors once the GPU has come past `after`; raises DeviceTransferFailed."""

    def receive(self, pieces: Sequence[torch.Tensor], after: Any) -> Work:
        """Receive into flat tensors once the GPU has come past `after`; raises DeviceTransferFailed."""

    def check(self) -> None:
        """Raises DeviceTransferFailed where the library has noticed an error by itself."""

    def abort(self) -> bool:
        """End whatever is under way; True when the GPU touches no memory of a transfer any more."""
