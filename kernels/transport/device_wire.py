"""What is under a device channel: a stream socket, a link of two GPUs, and the words of both ends about them.

Whoever reads takes in all there is: answers to transfers are heard at once, and frames are set aside for the
owner, since a word stands behind the peer's frames and must not wait until the owner wants those.

Two threads for each: the mover joins the link, then posts and polls transfers while there are any; the
watchdog ends the channel when one takes too long or the link reports an error, and aborts the link then.
"""

import contextlib
import enum
import logging
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.transport.device_link import DeviceLink
from kernels.transport.device_parts import unwrap
from kernels.transport.doorbell import Doorbell
from kernels.transport.errors import (
    ChannelClosed,
    ChannelError,
    DeviceLinkFailed,
    DeviceTransferFailed,
    FrameMalformed,
    FrameTruncated,
    HelloRefused,
)
from kernels.transport.frame import HELLO, PARTS_COUNT_MAX, Frame, FrameLimits, Header
from kernels.transport.stream import StreamChannel
from kernels.transport.transfers import Transfers

logger = logging.getLogger(__name__)

OWN = ""  # kind of the frames that the two ends of a channel say to each other, and no owner sees
TRANSFER_TIMEOUT_S = 20.0
OPEN_TIMEOUT_S = 60.0
WATCH_S = 0.25
GRACE_S = 1.0  # for a transfer whose peer has closed: it may be over, and only its end not seen yet
QUIET_WAIT_S = 10.0
POLL_MIN_S, POLL_MAX_S = 0.0001, 0.002
ASIDE_BYTES_MAX = 64 << 20


class Word(enum.StrEnum):
    """What the two ends of a channel say to each other."""

    WELCOME = "welcome"
    JOINING = "joining"
    TAKEN = "taken"
    REFUSED = "refused"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Aside:
    """A frame that has been read and that its owner has not asked for; `parts` are those of the socket."""

    header: Header
    parts: list[memoryview]
    size_bytes: int


class DeviceWire(StreamChannel):
    """A stream channel that can move transfers between two GPUs, and knows how either may end."""

    def __init__(
        self,
        sock: socket.socket,
        link: DeviceLink,
        limits: FrameLimits | None = None,
        pending_bytes_max: int = 1 << 30,
    ):
        self.timeout_s = TRANSFER_TIMEOUT_S
        self.open_timeout_s = OPEN_TIMEOUT_S
        self._link = link
        self._greeted = False  # before that, all that comes is a stranger's hello
        self._awaited = Word.JOINING  # by which the peer agrees to join
        self._agreement: Any = None  # what it said with it
        self._agreed = threading.Event()
        self._joined_s = 0.0
        self._transfers = Transfers(link)
        self._reading = threading.Lock()
        self._aside: deque[Aside] = deque()
        self._aside_bytes = 0
        self._ending: ChannelError | None = None  # the peer's end, once all it said has been read
        self._ending_s = 0.0
        self._unanswered = False  # whether anything announced will never be answered
        self._failure: ChannelError | None = None
        self._over_s = math.inf
        self._stirred, self._over, self._quiet = threading.Event(), threading.Event(), threading.Event()
        self._quiet.set()
        self._threads: list[threading.Thread] = []
        super().__init__(sock, limits, pending_bytes_max)
        self._bell = Doorbell(sock)

    def greet(self, hello: dict) -> None:
        """Say hello to who accepts us, and what the GPUs need to join; raises ChannelClosed."""
        self._awaited = Word.WELCOME
        super().send(HELLO, {**hello, "device": self._link.offer()})
        self._join()

    def welcome(self, hello: dict) -> None:
        """Join the GPU of a peer whose hello was good; raises HelloRefused where it offers none of use."""
        offer = hello.get("device")
        if not isinstance(offer, dict):
            raise HelloRefused("the peer says nothing of its GPU; connect with the scheme of this address")
        answer = self._link.answer(offer)
        self._say(Word.WELCOME, answer)
        self._join()

    def _join(self) -> None:
        self._greeted = True
        self._quiet.clear()
        for name, run in (("mover", self._move), ("watchdog", self._guard)):
            thread = threading.Thread(target=run, name=f"device-channel-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def fileno(self) -> int:
        """Descriptor to wait on; -1 once closed."""
        return self._bell.fileno()

    @property
    def joined_s(self) -> float:
        """When the GPUs were joined; now while they are, 0 before the peer agrees to it."""
        return self._joined_s or (time.monotonic() if self._agreed.is_set() else 0.0)

    @property
    def is_quiet(self) -> bool:
        """Whether no GPU touches memory of a transfer: none is under way, or the link has been aborted."""
        return self._quiet.is_set() or not self._transfers.moving

    @property
    def closes_at_once(self) -> bool:
        """Whether no GPU touches memory of a transfer any more, or all have had their time to let go."""
        return self.is_quiet or self._quiet_left_s <= 0

    @property
    def _quiet_left_s(self) -> float:
        return self._over_s + QUIET_WAIT_S - time.monotonic()

    def close(self) -> None:
        """End the channel, and wait for GPUs to let go of the memory of transfers under way.

        Where they do not within a time that began with the end, it returns, and the channel is not quiet.
        """
        super().close()
        with self._reading:
            pass  # whoever reads has let go of the descriptors
        if not self._threads:
            self._link.abort()
        elif self._transfers.moving and threading.current_thread() not in self._threads:
            self._quiet.wait(max(self._quiet_left_s, 0))

    def _check_open(self) -> None:
        if self._failure is not None:  # for who sends it is an end, whatever the peer has done wrong
            kind = type(self._failure) if isinstance(self._failure, ChannelClosed) else ChannelClosed
            raise kind(*self._failure.args)
        super()._check_open()

    def _hold(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)
        super()._hold()

    def _wait(self, event: int, end_s: float) -> bool:
        if event & select.POLLIN:
            return super()._wait(event, end_s)
        left_s = end_s - time.monotonic()  # the mover reads meanwhile, and nothing rings for who only sends
        time.sleep(max(min(POLL_MIN_S, left_s), 0))
        return left_s > 0

    def _close_descriptors(self) -> None:
        self._bell.close()
        super()._close_descriptors()

    def _end_locked(self) -> bool:
        if not super()._end_locked():
            return False
        self._over_s = time.monotonic()
        self._over.set()
        self._stirred.set()
        self._bell.ring()
        return True

    def _take_in(self) -> bool:
        """Read all that is here: answers are heard, frames set aside; True where there was anything."""
        with self._reading:
            try:
                self._hold()
            except ChannelError:
                return False  # nothing is read any more
            try:
                return self._read_all()
            finally:
                self._let_go()

    def _read_all(self) -> bool:
        found = False
        while self._reads:
            try:
                frame = self.reader.read(None)
                if frame is None:
                    return found
                found = True
                self._sort(frame)
            except ChannelError as error:
                self._note_ending(error)
        return found

    @property
    def _reads(self) -> bool:
        """Whether anything more is read: no stranger's frames, none after the last, and not without limit."""
        return self._greeted and self._ending is None and self._aside_bytes <= ASIDE_BYTES_MAX

    def _sort(self, frame: Frame) -> None:
        if frame.kind == OWN:
            self._hear(frame.body)
            return
        header = unwrap(frame, self.reader.limits)
        size_bytes = self.reader.header_bytes + sum(part.nbytes for part in frame.parts)
        self._aside_bytes += size_bytes
        self._aside.append(Aside(header, frame.parts, size_bytes))

    def _hear(self, said: Any) -> None:
        """Take a word of the peer's end of this channel; raises FrameMalformed."""
        try:
            match said:
                case [self._awaited, dict() as agreement] if not self._agreed.is_set():
                    self._agreement = agreement
                    self._agreed.set()
                case [Word.TAKEN, [*sizes]] if is_sizes(sizes):
                    self._transfers.taken(sizes)
                case [Word.REFUSED, None]:
                    self._transfers.refused()
                case [Word.LINK, told]:
                    self._link.hear(told)
                case _:
                    raise ValueError("no word of a device channel")
        except ValueError as error:
            raise FrameMalformed(f"the peer's end of the channel errs: {error}") from error

    def _note_ending(self, error: ChannelError) -> None:
        self._ending, self._ending_s = error, time.monotonic()
        self._unanswered |= self._transfers.drop_unanswered() > 0

    def _say(self, word: Word, value: Any) -> None:
        """Say something to the peer's end of this channel; one that has gone cannot hear it any more."""
        with contextlib.suppress(ChannelError):
            super().send(OWN, [word, value])
        self._mind()

    def _turn(self) -> bool:
        """Read and send what can go, and take a turn at transfers; who waits for a frame looks again then."""
        found = self._take_in()
        self._send_on()
        if not self._act() and not found:
            return False
        self._bell.ring()
        return True

    def _send_on(self) -> None:
        """Send what the peer takes now; what it said before it went is still read."""
        with contextlib.suppress(ChannelClosed):
            super().push()

    def _mind(self) -> None:
        """Wait for the socket only where something would come of it."""
        self._bell.watch(lambda: (self._reads, bool(self._pending)))

    def _act(self) -> bool:
        """Take a turn at the transfers; True where one is over, or the channel."""
        try:
            return not self._ended and self._transfers.act()
        except ChannelError as error:
            self._fail(error)
            return True

    def _move(self) -> None:
        """The mover: joins the link, then takes part in reading, posting and polling while anything moves."""
        try:
            if not self._open():
                return
            while not self._ended:
                if not self._transfers.moving:
                    self._stirred.wait()
                    self._stirred.clear()
                    continue
                if not self._turn():
                    self._pause()
                self._mind()
        except ChannelError as error:
            self._take_in()
            if self._ending is None:  # else the peer has gone, which is what its owner is to hear
                self._fail(error)
            self._bell.ring()
        except Exception as error:
            logger.exception("the mover of the channel to %s failed", self.peer or "a peer")
            self._fail(DeviceTransferFailed(f"{type(error).__name__} while transfers were moved"))

    def _open(self) -> bool:
        """Join the link once both ends know of each other; False where the peer turned us away or has gone.

        A link that waits for a peer that has gone may wait for ever, and nothing can end that.
        """
        if not self._comes(self._agreed.is_set):
            return False
        confirmed = self._agreement
        if self._awaited is Word.WELCOME:
            super().send(OWN, [Word.JOINING, self._link.confirm(confirmed)])
            confirmed = None
            if not self._comes(lambda: not self._pending):
                return False
        self._transfers.open(confirmed, lambda told: self._say(Word.LINK, told))
        self._joined_s = time.monotonic()
        self._bell.ring()
        return True

    def _comes(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened between both ends; False where one of them has ended."""
        while True:
            found = self._take_in()
            self._send_on()
            if found:
                self._bell.ring()  # what was set aside is its owner's
            if self._ending is not None or self._ended or self._peer_deaf:
                self._bell.ring()
                return False
            if happened():
                return True
            if not found:
                self._over.wait(POLL_MAX_S)

    def _pause(self) -> None:
        """Until it is worth looking again: soon where a transfer has only just begun."""
        age_s = self._transfers.age_s(time.monotonic())
        if age_s is None:
            self._over.wait(POLL_MAX_S)
        else:
            time.sleep(min(max(age_s / 4, POLL_MIN_S), POLL_MAX_S))

    def _guard(self) -> None:
        """The watchdog: judges while the channel lives, and aborts the link when it has ended."""
        begin_s = time.monotonic()
        while not self._over.wait(WATCH_S):
            try:
                self._judge(time.monotonic(), begin_s)
            except ChannelError as error:
                self._fail(error)
        if self._transfers.abort():
            self._quiet.set()
            self._tell_change()
        else:
            logger.error("the link to %s could not be aborted; its memory stays taken", self.peer or "a peer")

    def _judge(self, now_s: float, begin_s: float) -> None:
        """Raises the error that the channel is to end with, if it is to end."""
        if self._ending is not None and now_s - self._ending_s > GRACE_S:
            if self._transfers.receiving:
                raise FrameTruncated("the peer went away inside a frame")
            if self._transfers.sending:
                raise ChannelClosed("the peer went away inside a transfer")
        if not self._transfers.opened and now_s - begin_s > self.open_timeout_s:
            raise DeviceLinkFailed(f"the GPUs were not joined within {self.open_timeout_s} s")
        self._transfers.judge(now_s, self.timeout_s)

    def _fail(self, error: ChannelError) -> None:
        """End the channel with an error that every later use of it names; the first one counts."""
        with self._lock:
            if self._ended:
                return
            self._failure = error
        logger.warning("the channel to %s failed: %s: %s", self.peer or "a peer", type(error).__name__, error)
        self.end()


def is_sizes(sizes: Sequence[Any]) -> bool:
    """Whether what a peer says is a list of counts of bytes."""
    return len(sizes) <= PARTS_COUNT_MAX and all(type(size) is int and size > 0 for size in sizes)
