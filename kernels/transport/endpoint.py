"""An address that peers can reach: accepts their channels and hands on their frames."""

import functools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kernels.transport.connect import accepted, connect, listen, welcome
from kernels.transport.errors import (
    ChannelClosed,
    ChannelError,
    ChannelStalled,
    ChannelTimeout,
    ConnectFailed,
    FrameTruncated,
    HelloRefused,
)
from kernels.transport.frame import Buffers, Frame, FrameLimits, Header
from kernels.transport.stream import StreamChannel

logger = logging.getLogger(__name__)

FRAMES_PER_TURN = 16  # of one channel before the next has its turn
SWEEP_S = 1.0
CLOSE_TIMEOUT_S = 5.0
STRANGERS_MAX = 256  # peers that have said no hello yet; each has descriptors
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


@dataclass
class EndpointCounts:
    """What an endpoint has seen since it began."""

    frames_count: int = 0
    refused_peers_count: int = 0


class Endpoint:
    """Watches one listener and any number of channels, in its own thread or polled by its owner.

    A peer that breaks the protocol loses its channel and nothing else; a peer that falls silent inside
    a frame for `stall_s` is dropped, one that has not said hello in that time likewise, and sooner where
    there are many. The callbacks run in the thread that polls, one at a time: `on_frame` may raise a
    FrameError to have the peer dropped, and `on_closed` is told of every channel that ended, by whichever
    side, before the endpoint itself did, once GPUs have let go of its memory or had the time to.
    """

    def __init__(
        self,
        address: str,
        secret: str,
        name: str,
        on_frame: Callable[[StreamChannel, Frame], None],
        on_closed: Callable[[StreamChannel], None] | None = None,
        choose_buffers: Callable[[StreamChannel, Header], Buffers | None] | None = None,
        limits: FrameLimits | None = None,
        stall_s: float = 30.0,
    ):
        self.counts = EndpointCounts()
        self.name = name
        self._secret = secret
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._choose_buffers = choose_buffers
        self._limits = limits or FrameLimits()
        self._stall_s = stall_s
        self._sweep_s = min(SWEEP_S, stall_s)
        self._swept_s = time.monotonic()
        self._listener = listen(address)
        self.address = self._listener.address
        self._listening = True
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        for sock in (self._wake_in, self._wake_out):
            sock.setblocking(False)
        self._selector.register(self._listener, READ, self._accept)
        self._selector.register(self._wake_in, READ, self._drain_wakes)
        self._channels: set[StreamChannel] = set()
        self._joining: deque[StreamChannel] = deque()
        self._changed: set[StreamChannel] = set()  # filled by other threads, emptied by the polling one
        self._ended: set[StreamChannel] = set()  # whose memory GPUs may still touch
        self._thread: threading.Thread | None = None
        self._turn = threading.RLock()  # held to poll or to tear down
        self._gate = threading.Lock()  # held to wake or join, so that neither meets an endpoint torn down
        self._closing = False
        self._torn_down = False

    def connect(self, address: str, timeout_s: float = 5.0) -> StreamChannel:
        """A channel to another endpoint, watched by this one; raises ConnectFailed, ChannelClosed."""
        channel = connect(address, self._secret, self.name, timeout_s)
        channel.peer = address
        channel.reader.limits = self._limits
        if not self._adopt(channel):
            raise ChannelClosed(f"the endpoint {self.name} is closed")
        self.wake()
        return channel

    def poll(self, timeout_s: float) -> int:
        """Wait up to `timeout_s` for anything to happen, act on it, and return how many frames came."""
        before = self.counts.frames_count
        with self._turn:
            try:
                if not self._closing:
                    self._take_turn(timeout_s)
            finally:
                if self._closing:
                    self._tear_down()
        return self.counts.frames_count - before

    def start(self) -> None:
        """Poll in a thread of its own until closed."""
        self._thread = threading.Thread(target=self._run, name=f"{self.name}-endpoint", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Make a waiting `poll` return at once; safe from any thread."""
        with self._gate:
            if self._torn_down:
                return
            try:
                self._wake_out.send(b"1")
            except BlockingIOError:
                pass  # full of wakes already

    def close(self) -> None:
        """Close the listener and every channel; from any thread, also while another one polls."""
        with self._gate:
            self._closing = True
        self.wake()
        if self._turn.acquire(timeout=CLOSE_TIMEOUT_S):
            self._tear_down()
            self._turn.release()
        # else a callback takes long; its poll tears down when it ends
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing:
            try:
                self.poll(self._sweep_s)
            except Exception:
                logger.exception("%s: a turn of the endpoint failed; it goes on", self.name)

    def _take_turn(self, timeout_s: float) -> None:
        self._watch_joining()
        self._watch_changed()
        self._close_ended()
        for key, events in self._selector.select(timeout_s):
            if self._closing:
                return
            if isinstance(key.data, StreamChannel):
                self._serve(key.data, events)
            else:
                key.data()
        if time.monotonic() - self._swept_s >= self._sweep_s:
            self._sweep()

    def _tear_down(self) -> None:
        with self._gate:
            if self._torn_down:
                return
            self._torn_down = True
            self._wake_in.close()
            self._wake_out.close()
            ended = [*self._channels, *self._joining, *self._ended]
            self._joining.clear()
        self._channels.clear()
        self._ended.clear()
        self._selector.close()
        self._listener.close()
        for channel in ended:
            channel.end()
        for channel in ended:  # each may wait for GPUs, which all let go meanwhile
            channel.release()

    # who comes

    def _accept(self) -> None:
        try:
            while (sock := self._listener.accept()) is not None:
                self._adopt(accepted(sock, self.address))
        except OSError as error:  # most likely no descriptor is free: let them wait until the next sweep
            logger.warning("%s: cannot accept peers for the moment: %s", self.name, error)
            self._selector.unregister(self._listener)
            self._listening = False
        self._watch_joining()
        self._bound_strangers()

    def _bound_strangers(self) -> None:
        """Drop the oldest peers above the limit whose hello is not here either."""
        strangers = [channel for channel in self._channels if not channel.peer]
        strangers.sort(key=lambda channel: channel.began_s)
        for channel in strangers[:-STRANGERS_MAX]:
            self._serve(channel, READ)
            if channel in self._channels and not channel.peer:
                self._refuse(channel, HelloRefused(f"over {STRANGERS_MAX} peers have said no hello yet"))

    def _adopt(self, channel: StreamChannel) -> bool:
        """Take a channel on; False, and the channel released, where the endpoint is closing."""
        try:
            channel.watch(functools.partial(self._on_change, channel))
        except ChannelError:  # its end came first
            channel.close()
            raise
        with self._gate:
            if not self._closing:
                self._joining.append(channel)
                return True
        channel.release()
        return False

    def _watch_joining(self) -> None:
        while self._joining:
            channel = self._joining.popleft()
            self._channels.add(channel)
            self._selector.register(channel, READ | (WRITE if channel.has_pending else 0), channel)

    def _greet(self, channel: StreamChannel) -> bool:
        """True once a stranger has said a valid hello."""
        hello = channel.receive_ready()
        if hello is None:
            return False
        welcome(channel, hello, self._secret, self._limits)
        return True

    # who sends

    def _on_change(self, channel: StreamChannel) -> None:
        self._changed.add(channel)
        self.wake()

    def _watch_changed(self) -> None:
        """Wait for room on channels that have bytes to send, until they have none."""
        while self._changed:
            channel = self._changed.pop()
            if channel in self._channels:
                self._selector.modify(channel, READ | (WRITE if channel.has_pending else 0), channel)

    def _push(self, channel: StreamChannel) -> None:
        try:
            done = channel.push()
        except ChannelClosed:
            done = True  # what the peer said before it went is still read, up to its end
        if done:
            self._changed.add(channel)

    def _drain_wakes(self) -> None:
        try:
            while self._wake_in.recv(4096):
                pass
        except BlockingIOError:
            pass

    # what comes in

    def _serve(self, channel: StreamChannel, events: int) -> None:
        try:
            if events & READ:
                self._receive(channel)
            if events & WRITE:
                self._push(channel)
        except ChannelClosed:
            self._drop(channel)
        except ChannelError as error:
            self._refuse(channel, error)
        except Exception:
            logger.exception("%s: a frame of %s could not be handled", self.name, named(channel))
            self.counts.refused_peers_count += 1
            self._drop(channel)

    def _receive(self, channel: StreamChannel) -> None:
        if not channel.peer and not self._greet(channel):
            return
        choose = self._choose_buffers and functools.partial(self._choose_buffers, channel)
        for _ in range(FRAMES_PER_TURN):
            frame = channel.receive_ready(choose)
            if frame is None:
                return
            self.counts.frames_count += 1
            self._hand_on(channel, frame)

    def _hand_on(self, channel: StreamChannel, frame: Frame) -> None:
        try:
            self._on_frame(channel, frame)
        except (ChannelClosed, ChannelStalled, ChannelTimeout, ConnectFailed) as error:
            # some channel could not be sent on, this or another: no fault of who sent the frame, and if it
            # was this one, its end shows when it is read
            logger.info("%s: a frame of %s was not answered: %s", self.name, named(channel), error)

    # who goes

    def _refuse(self, channel: StreamChannel, error: ChannelError) -> None:
        self.counts.refused_peers_count += 1
        logger.warning("%s: dropped %s: %s: %s", self.name, named(channel), type(error).__name__, error)
        self._drop(channel)

    def _drop(self, channel: StreamChannel) -> None:
        if channel not in self._channels:
            return  # the endpoint was closed by the callback
        self._channels.remove(channel)
        self._selector.unregister(channel)
        channel.end()
        self._ended.add(channel)
        self._close_ended()

    def _close_ended(self) -> None:
        """Close the channels that have ended, each once no other has to wait for it."""
        for channel in list(self._ended):
            if channel in self._ended and channel.closes_at_once:  # a callback may close the endpoint
                self._ended.remove(channel)
                channel.release()
                self._tell_closed(channel)

    def _tell_closed(self, channel: StreamChannel) -> None:
        if self._on_closed is None or not channel.peer:
            return
        try:
            self._on_closed(channel)
        except Exception:
            logger.exception("%s: the end of %s could not be handled", self.name, named(channel))

    def _sweep(self) -> None:
        """Drop peers that stand still inside a frame or before a hello; listen again after a pause."""
        self._swept_s = now_s = time.monotonic()
        for channel in list(self._channels):
            if not channel.peer and now_s - channel.began_s > self._stall_s:
                self._refuse(channel, HelloRefused(f"no hello came within {self._stall_s} s"))
            elif channel.reader.inside_frame and now_s - channel.reader.progress_s > self._stall_s:
                self._refuse(channel, FrameTruncated(f"nothing came for {self._stall_s} s inside a frame"))
        if not self._listening and not self._closing:
            self._selector.register(self._listener, READ, self._accept)
            self._listening = True


def named(channel: StreamChannel) -> str:
    """The peer's name for a log."""
    return channel.peer or "a stranger"
