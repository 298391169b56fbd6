"""Frames over a stream socket: `tcp://` between hosts, `unix://` and `memory://` within one."""

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from kernels.transport.errors import (
    ChannelClosed,
    ChannelError,
    ChannelStalled,
    ChannelTimeout,
    FrameMalformed,
    FrameTruncated,
)
from kernels.transport.frame import (
    PREFIX,
    Body,
    ChooseBuffers,
    Frame,
    FrameLimits,
    Header,
    decode_header,
    decode_prefix,
    encode,
)

AWAKE_S = 0.001  # looked for without sleeping: a core that slept computes slowly for a while after an answer
VECTORS_MAX = 512  # buffers in one system call; Linux takes 1,024
DRAIN_BYTES = 1 << 16


class StreamReader:
    """Puts frames together from what a socket has ready, straight into the memory chosen for them."""

    def __init__(self, sock: socket.socket, limits: FrameLimits):
        self.limits = limits
        self.progress_s = time.monotonic()
        self.header_bytes = 0  # of the newest frame
        self._sock = sock
        self._prefix = memoryview(bytearray(PREFIX.size))
        self._waiting: deque[memoryview] = deque()
        self._begin()

    def read(self, choose_buffers: ChooseBuffers | None) -> Frame | None:
        """The next frame if all of it is here; raises ChannelClosed at a clean end, else a FrameError."""
        while self._fill():
            if self._header is not None:
                return self._finish(self._header)
            if self._head is None:
                self.header_bytes, self._payload_bytes = decode_prefix(self._prefix, self.limits)
                self._head = memoryview(bytearray(self.header_bytes))
                self._waiting.append(self._head)
            else:
                header = decode_header(self._head, self._payload_bytes)
                chosen = self._choose(header, choose_buffers)
                self._waiting.extend([view.cast("B") for view in chosen if view.nbytes])
                self._header = header
        return None

    def _begin(self) -> None:
        self.inside_frame = False  # True while part of a frame is here and the rest is not
        self._head: memoryview | None = None
        self._payload_bytes = 0
        self._header: Header | None = None
        self._parts: list[memoryview] = []
        self._refused = False
        self._waiting.append(self._prefix)

    def _choose(self, header: Header, choose_buffers: ChooseBuffers | None) -> Sequence[memoryview]:
        if choose_buffers is None:
            self._parts = [memoryview(bytearray(size)) for size in header.part_sizes]
            return self._parts
        chosen = choose_buffers(header)
        if chosen is None:
            self._refused = True
            return self._drain(header.payload_bytes)
        if sum(view.nbytes for view in chosen) != header.payload_bytes:
            raise FrameMalformed(f"the payload of {header.kind!r} does not fit the memory chosen for it")
        self._parts = list(chosen)
        return self._parts

    @staticmethod
    def _drain(size: int) -> list[memoryview]:
        """One small scratch again and again, until `size` bytes have gone into it."""
        scratch = memoryview(bytearray(min(size, DRAIN_BYTES)))
        whole, rest = divmod(size, DRAIN_BYTES)
        return [scratch] * whole + [scratch[:rest]]

    def _fill(self) -> bool:
        """Read until nothing is waited for (True) or nothing is ready (False)."""
        waiting = self._waiting
        while waiting:
            try:
                if len(waiting) == 1:
                    count = self._sock.recv_into(waiting[0])
                else:
                    count = self._sock.recvmsg_into(list(islice(waiting, VECTORS_MAX)))[0]
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._gone() from error
            if count == 0:
                raise self._gone()
            self.inside_frame = True
            self.progress_s = time.monotonic()
            advance(waiting, count)
        return True

    def _gone(self) -> ChannelError:
        if self.inside_frame:
            return FrameTruncated("the peer went away inside a frame")
        return ChannelClosed("the peer closed the channel")

    def _finish(self, header: Header) -> Frame:
        frame = Frame(header.kind, header.body, self._parts, self._refused)
        self._begin()
        return frame


class StreamChannel:
    """A channel over one connected stream socket; any thread may send or close, one thread receives.

    After an error, or `close`, nothing more is sent or received. The descriptor goes with `close`, and not
    before the last thread or endpoint that uses it: its number must not pass to another connection under
    their hands.
    """

    carries_tensors = False
    is_quiet = True
    closes_at_once = True
    """Whether `close` waits for nobody any more."""
    joined_s = 0.0
    """When the GPUs of both ends were joined; now while they are, 0 before the peer agrees, or without."""

    def __init__(
        self, sock: socket.socket, limits: FrameLimits | None = None, pending_bytes_max: int = 1 << 30
    ):
        sock.setblocking(False)
        self.peer = ""
        self.began_s = time.monotonic()
        self.pending_bytes_max = pending_bytes_max
        self.reader = StreamReader(sock, limits or FrameLimits())
        self._sock = sock
        self._lock = threading.Lock()
        self._pending: deque[memoryview] = deque()
        self._pending_bytes = 0
        self._on_change: Callable[[], None] | None = None
        self._users_count = 0
        self._peer_deaf = False
        self._ended = False
        self._closed = False

    def send(self, kind: str, body: Body = None, parts: Sequence[memoryview] = ()) -> None:
        """Queue a frame and send what the peer takes now; raises ChannelClosed, ChannelStalled."""
        views = [memoryview(encode(kind, body, parts)), *(part.cast("B") for part in parts if part.nbytes)]
        size = sum(map(len, views))
        with self._lock:
            self._check_open()
            self._pending.extend(views)
            self._pending_bytes += size
            left = self._push_locked()
            stalled = left - size > self.pending_bytes_max  # the frame itself may be larger than the limit
            if stalled:
                self._end_locked()
        if stalled:
            raise ChannelStalled(f"{left} bytes wait for {self.peer or 'the peer'}; it has stopped reading")
        if left:
            self._tell_change()

    def push(self) -> bool:
        """Send what the peer takes now; True when nothing is left to send; raises ChannelClosed."""
        with self._lock:
            self._check_open()
            return self._push_locked() == 0

    def flush(self, timeout_s: float) -> None:
        """Wait until everything queued has left; only `receive` also takes what the peer sends meanwhile."""
        end_s = time.monotonic() + timeout_s
        while not self.push():
            if not self._wait(select.POLLOUT, end_s):
                raise ChannelTimeout(f"the peer did not take all bytes within {timeout_s} s")

    def receive_ready(self, choose_buffers: ChooseBuffers | None = None) -> Frame | None:
        """The next frame if it is here whole, else None; never waits; raises ChannelClosed, FrameError."""
        self._hold()
        try:
            return self._next_frame(choose_buffers)
        except Exception as error:  # whatever it is, the place in the stream is lost
            if self.end():
                raise
            raise ChannelClosed("the channel was closed while it was read") from error
        finally:
            self._let_go()

    def receive(self, timeout_s: float, choose_buffers: ChooseBuffers | None = None) -> Frame:
        """Wait for the next whole frame; raises ChannelTimeout, ChannelClosed, FrameError."""
        begin_s = time.monotonic()
        end_s, awake_end_s = begin_s + timeout_s, begin_s + min(AWAKE_S, timeout_s)
        while True:
            unsent = self.has_pending and not self.push()
            awake = time.monotonic() < awake_end_s
            if not awake and not self._wait(select.POLLIN | (select.POLLOUT if unsent else 0), end_s):
                raise ChannelTimeout(f"no whole frame came within {timeout_s} s")
            frame = self.receive_ready(choose_buffers)
            if frame is not None:
                return frame
            if awake:
                os.sched_yield()  # to whoever is to answer, where processes are more than cores

    @property
    def has_pending(self) -> bool:
        """True while bytes wait for the peer to take them."""
        return bool(self._pending)

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait for the peer to take them."""
        return self._pending_bytes

    def fileno(self) -> int:
        """Descriptor of the socket, also after an error; -1 once closed."""
        return self._sock.fileno()

    def watch(self, on_change: Callable[[], None]) -> None:
        """Let an endpoint use the descriptor until `release`, and hear of bytes not taken, and of quiet."""
        self._hold()
        self._on_change = on_change

    def release(self) -> None:
        """Close a channel that an endpoint has stopped watching."""
        if self._on_change is not None:
            self._on_change = None
            self._let_go()
        self.close()

    def end(self) -> bool:
        """Send and receive no more, from now on; `close` is yet to come; False where that had been done."""
        with self._lock:
            return self._end_locked()

    def close(self) -> None:
        """End the channel; what still waits to be sent is dropped, and who waits for a frame is woken."""
        with self._lock:
            self._end_locked()
            self._closed = True
            if self._users_count == 0:
                self._close_descriptors()

    def _next_frame(self, choose_buffers: ChooseBuffers | None) -> Frame | None:
        return self.reader.read(choose_buffers)

    def _close_descriptors(self) -> None:
        self._sock.close()

    def _hold(self) -> None:
        with self._lock:
            if self._ended:
                raise ChannelClosed("the channel is closed")
            self._users_count += 1

    def _let_go(self) -> None:
        with self._lock:
            self._users_count -= 1
            if self._closed and self._users_count == 0:
                self._close_descriptors()

    def _tell_change(self) -> None:
        on_change = self._on_change
        if on_change is not None:
            on_change()

    def _end_locked(self) -> bool:
        """Let go of what waits and wake every waiter; False where that had been done."""
        if self._ended:
            return False
        self._ended = True
        self._forget_pending()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was quicker
        return True

    def _check_open(self) -> None:
        if self._ended or self._peer_deaf:
            raise ChannelClosed("the peer went away" if self._peer_deaf else "the channel is closed")

    def _push_locked(self) -> int:
        while self._pending:
            try:
                count = self._sock.sendmsg(list(islice(self._pending, VECTORS_MAX)))
            except BlockingIOError:
                break
            except OSError as error:
                self._stop_sending()
                raise ChannelClosed("the peer went away") from error
            self._pending_bytes -= count
            advance(self._pending, count)
        return self._pending_bytes

    def _stop_sending(self) -> None:
        """Say no more to a peer that cannot take it; what it said before it went can still be read."""
        self._peer_deaf = True
        self._forget_pending()
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer was quicker

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._pending_bytes = 0

    def _wait(self, event: int, end_s: float) -> bool:
        """Wait for an event; at least look for it, however late it is."""
        left_s = max(end_s - time.monotonic(), 0.0)
        self._hold()
        try:
            poller = select.poll()
            poller.register(self, event)
            return bool(poller.poll(left_s * 1000))
        finally:
            self._let_go()


def advance(views: deque[memoryview], count: int) -> None:
    """Drop the first `count` bytes of a queue of views."""
    while count:
        first = views.popleft()
        size = len(first)
        if count < size:
            views.appendleft(first[count:])
            return
        count -= size
