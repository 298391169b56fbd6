"""The transfers of one device channel, both ways, over its link: who takes a turn posts and polls them."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from kernels.transport.device_link import DeviceLink, Tell, Work
from kernels.transport.device_parts import cut
from kernels.transport.errors import DeviceTransferFailed
from kernels.transport.transfer_queue import Transfer, TransferQueue

ABORT_WAIT_S = 1.0  # for a thread inside a call of the link to come out by itself

Post = Callable[[Sequence[torch.Tensor], Any], Work]


class Transfers:
    """Safe from any thread; none waits for another that is inside a call of the link."""

    _kept: ClassVar[list["Transfers"]] = []
    """Those whose memory a GPU may still use: torch would give it away if nobody held it."""

    def __init__(self, link: DeviceLink):
        self.link = link
        self.opened = False
        self._lock = threading.Lock()  # guards both queues
        self._acting = threading.Lock()  # held to post and poll
        self._outgoing, self._incoming = TransferQueue(), TransferQueue()

    @property
    def sending(self) -> bool:
        """Whether anything that was announced to the peer is not over."""
        return bool(self._outgoing)

    @property
    def receiving(self) -> bool:
        """Whether anything that the peer announced is not all here."""
        return bool(self._incoming)

    @property
    def moving(self) -> bool:
        """Whether anything is under way or waits to be."""
        return self.sending or self.receiving

    @property
    def unsent_bytes(self) -> int:
        """Bytes of what was announced to the peer and is not over."""
        return self._outgoing.size_bytes

    def open(self, confirmed: Any, tell: Tell) -> None:
        """Join the peer's GPU; may wait long; raises DeviceLinkFailed."""
        self.link.open(confirmed, tell)
        self.opened = True

    def announce(self, pieces: Sequence[torch.Tensor], after: Any) -> Transfer:
        """Have these sent once the peer has taken them."""
        transfer = Transfer(pieces, sum(piece.nbytes for piece in pieces), after)
        with self._lock:
            self._outgoing.announce(transfer)
        return transfer

    def retract(self, transfer: Transfer) -> None:
        """Take back what was announced, before the peer could hear of it."""
        with self._lock:
            self._outgoing.retract(transfer)

    def taken(self, sizes: Sequence[int]) -> None:
        """The peer is ready to receive the next in tensors of these sizes; raises ValueError."""
        with self._lock:
            self._outgoing.taken(sizes)

    def refused(self) -> None:
        """The peer does not want the next; raises ValueError."""
        with self._lock:
            self._outgoing.refused()

    def receive(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], after: Any) -> None:
        """Receive what the peer sends from tensors of these sizes."""
        with self._lock:
            self._incoming.announce(Transfer(tensors, sum(sizes), after))
            self._incoming.taken(sizes)

    def drop_unanswered(self) -> int:
        """Give up what the peer will never answer; how many transfers that were."""
        with self._lock:
            return self._outgoing.drop_unanswered()

    def act(self) -> bool:
        """Post what can be posted, poll what is posted; True where one is over; raises DeviceTransferFailed.

        Does nothing while another thread is at it.
        """
        if not self.opened or not self._acting.acquire(blocking=False):
            return False
        try:
            sent = self._advance(self._outgoing, self.link.send)
            return self._advance(self._incoming, self.link.receive) or sent
        finally:
            self._acting.release()

    def judge(self, now_s: float, timeout_s: float) -> None:
        """Raises DeviceTransferFailed where one takes too long or the link has noticed an error."""
        if not self.opened:
            return
        self.link.check()
        with self._lock:
            for queue in (self._outgoing, self._incoming):
                if queue.is_overdue(now_s, timeout_s):
                    raise DeviceTransferFailed(
                        f"{queue.posted.size_bytes} bytes between GPUs took longer than {timeout_s} s"
                    )

    def age_s(self, now_s: float) -> float | None:
        """For how long the youngest that is posted has been so; None where none is."""
        with self._lock:
            posted = [self._outgoing.posted, self._incoming.posted]
        return min((now_s - transfer.posted_s for transfer in posted if transfer is not None), default=None)

    def abort(self) -> bool:
        """End the link and let go of all memory; False, and never let go, where a GPU may still use it."""
        free = self._acting.acquire(timeout=ABORT_WAIT_S)
        try:
            if not self.link.abort():
                self._kept.append(self)
                return False
        finally:
            if free:
                self._acting.release()
        with self._lock:
            self._outgoing.clear()
            self._incoming.clear()
        return True

    def _advance(self, queue: TransferQueue, post: Post) -> bool:
        with self._lock:
            transfer = queue.post(time.monotonic())
        if transfer is not None:
            transfer.work = post(cut(transfer.parts, transfer.peer_sizes), transfer.after)
        with self._lock:
            posted = queue.posted
        if posted is None or not posted.work.is_done():
            return False
        with self._lock:
            if queue.posted is posted:  # else an abort let go of it meanwhile
                queue.completed()
        return True
