"""Which transfer between two GPUs is next: a state machine without threads, clocks or GPUs.

    announced ──taken──▶ taken ──post──▶ posted ──completed──▶ gone
        └──refused──▶ gone

A transfer is announced in the header of its frame, and posted only once the peer has answered that it is
ready: a GPU that waits for a busy peer spins on some of its processors, and holds up whoever frees memory.
"""

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Stage(enum.Enum):
    """How far a transfer is."""

    ANNOUNCED = enum.auto()
    TAKEN = enum.auto()
    POSTED = enum.auto()


@dataclass(slots=True, eq=False)
class Transfer:
    """What one frame moves from GPU to GPU."""

    parts: Sequence[Any]
    """Flat tensors, none of them empty; they live, and stay as they are, until the transfer is gone."""
    size_bytes: int
    after: Any = None
    """Point in the GPU's work that it comes after."""
    peer_sizes: Sequence[int] = ()
    """Sizes of the tensors at the other end, together as many bytes."""
    stage: Stage = Stage.ANNOUNCED
    posted_s: float = 0.0
    work: Any = None
    """What the link says of it once it has been posted."""


class TransferQueue:
    """The transfers of one channel in one direction, oldest first; one at a time is posted."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._transfers: deque[Transfer] = deque()

    def __len__(self) -> int:
        return len(self._transfers)

    def announce(self, transfer: Transfer) -> None:
        """Add one whose header goes to the peer now."""
        self._transfers.append(transfer)
        self.size_bytes += transfer.size_bytes

    def retract(self, transfer: Transfer) -> None:
        """Take one back whose header did not go, unless the end of the channel was quicker."""
        if transfer in self._transfers:
            self._remove(transfer)

    def taken(self, peer_sizes: Sequence[int]) -> None:
        """The peer is ready for the oldest that it has not answered; raises ValueError for no such one."""
        transfer = self._unanswered()
        if sum(peer_sizes) != transfer.size_bytes:
            raise ValueError(f"{sum(peer_sizes)} bytes were taken of a transfer of {transfer.size_bytes}")
        transfer.peer_sizes = peer_sizes
        transfer.stage = Stage.TAKEN

    def refused(self) -> None:
        """The peer does not want the oldest that it has not answered; raises ValueError for no such one."""
        self._remove(self._unanswered())

    def post(self, now_s: float) -> Transfer | None:
        """The transfer to post now, from now on posted; None where the oldest is not ready or is posted."""
        if not self._transfers or self._transfers[0].stage is not Stage.TAKEN:
            return None
        self._transfers[0].stage = Stage.POSTED
        self._transfers[0].posted_s = now_s
        return self._transfers[0]

    @property
    def posted(self) -> Transfer | None:
        """The one transfer that is under way."""
        oldest = self._transfers[0] if self._transfers else None
        return oldest if oldest is not None and oldest.stage is Stage.POSTED else None

    def completed(self) -> None:
        """The posted transfer is over; raises ValueError where none is posted."""
        if self.posted is None:
            raise ValueError("no transfer is posted")
        self._remove(self._transfers[0])

    def is_overdue(self, now_s: float, timeout_s: float) -> bool:
        """Whether the posted transfer has taken longer than it may."""
        posted = self.posted
        return posted is not None and now_s - posted.posted_s > timeout_s

    def drop_unanswered(self) -> int:
        """Give up what the peer will never answer; how many transfers that were."""
        unanswered = [transfer for transfer in self._transfers if transfer.stage is Stage.ANNOUNCED]
        for transfer in unanswered:
            self._remove(transfer)
        return len(unanswered)

    def clear(self) -> None:
        """Let go of everything, once no GPU touches it any more."""
        self._transfers.clear()
        self.size_bytes = 0

    def _unanswered(self) -> Transfer:
        for transfer in self._transfers:
            if transfer.stage is Stage.ANNOUNCED:
                return transfer
        raise ValueError("an answer to no transfer")

    def _remove(self, transfer: Transfer) -> None:
        self._transfers.remove(transfer)
        self.size_bytes -= transfer.size_bytes
