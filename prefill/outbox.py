"""Where latents leave prefill: frames go out in order while the next layer is computed.

A thread of its own adds the checksum and hands each frame to the channel, which the endpoint's thread then
empties. Each decode node has a line of its own: one that falls behind holds up its own prompts alone.
Computing never waits here: it asks `has_room`, and computes for others meanwhile. Lines wait for one another
only while a channel is made: for CONNECT_TIMEOUT_S at most, and where nobody answers once in SHUNNED_S.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from decode.messages import DOWN as DECODE_DOWN
from decode.messages import FirstToken, Latents, checksum
from kernels.model.host_copies import HostCopy, own_stream
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError, ChannelTimeout, ConnectFailed
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import NAMES, as_bytes
from prefill.request import PrefillRequest

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
SHUNNED_S = 5.0  # for so long nothing is sent to an address where nobody answered, or took anything
UNSENT_BYTES_MAX = 128 << 20  # on one channel, before its line waits for the decode node
UNSENT_TIMEOUT_S = 10.0  # for a decode node to take anything at all, once its line waits
LOOK_S = 0.005  # between two looks at channels that are full
# Decode nodes that something waits for have equal shares of it, and lines that reached theirs take no more.
# One that filled while there were fewer keeps what it has: together they may hold more for a while.
QUEUED_BYTES_MAX = 1 << 30
HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Parcel:
    """One layer's latents of tokens `begin..end`, or the first token, which comes last."""

    request: PrefillRequest
    layer: int
    begin: int
    end: int
    latents: HostCopy | None
    token_id: int = -1

    @property
    def size_bytes(self) -> int:
        """Memory that it keeps."""
        return 0 if self.latents is None else self.latents.tensor.nbytes


@dataclass(slots=True)
class Line:
    """What waits for one decode node, and the channel there."""

    parcels: deque[Parcel] = field(default_factory=deque)
    queued_bytes: int = 0
    channel: StreamChannel | None = None
    unsent_bytes: int = 0
    """What the channel held when it was last found full."""
    progress_s: float = 0.0
    """When a full channel was last seen to hold less."""


class Outbox:
    """Sends parcels to the decode nodes that their requests have reservations on."""

    def __init__(
        self,
        endpoint: Endpoint,
        on_failed: Callable[[PrefillRequest], None],
        on_room: Callable[[], None] = lambda: None,
        device: torch.device = HOST,
    ):
        """Latents come from `device`; `on_room` is called whenever a parcel has left."""
        self.sent_bytes = 0
        self._device = device
        self._endpoint = endpoint
        self._on_failed = on_failed
        self._on_room = on_room
        self._lock = threading.Lock()
        self._lines: dict[str, Line] = {}  # by address: those with parcels, or with a channel
        self._shunned: dict[str, float] = {}  # until when
        self._work = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def put(self, parcel: Parcel) -> None:
        """Queue a parcel; its latents must not change any more."""
        with self._lock:
            line = self._lines.setdefault(parcel.request.asked.decode_address, Line())
            line.parcels.append(parcel)
            line.queued_bytes += parcel.size_bytes
        self._work.set()
        if self._thread is None:
            self.send_all()

    def has_room(self, address: str) -> bool:
        """Whether less waits for a decode node than its share of what may wait."""
        with self._lock:
            line = self._lines.get(address)
            shares_count = sum(1 for other in self._lines.values() if other.queued_bytes)
            return line is None or line.queued_bytes * max(shares_count, 1) < QUEUED_BYTES_MAX

    def start(self) -> None:
        """Send in a thread of its own until closed."""
        stream = own_stream(self._device)  # so that what leaves waits for its own computing alone
        self._thread = threading.Thread(
            target=self._run, args=(stream,), name=f"{self._endpoint.name}-outbox", daemon=True
        )
        self._thread.start()

    def send_all(self) -> None:
        """Send what decode nodes take now, on the caller's thread, a parcel to each in turn."""
        while any([self._send_next(line) for line in self._waiting()]):
            pass

    def forget(self, channel: StreamChannel) -> list[str]:
        """Connect anew to a decode node whose channel has closed; its address, if it was one."""
        with self._lock:
            lost = [address for address, line in self._lines.items() if line.channel is channel]
            for address in lost:
                self._lines[address].channel = None
                self._tidy(address)
        return lost

    def close(self) -> None:
        """Stop once nothing that is queued can be sent at once."""
        self._stopping = True
        self._work.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self, stream: AbstractContextManager) -> None:
        with stream:
            while not self._stopping:
                self._work.clear()  # before looking, so that what comes meanwhile is not slept through
                self.send_all()
                self._work.wait(LOOK_S if self._waiting() else None)
            self.send_all()

    def _waiting(self) -> list[Line]:
        with self._lock:
            return [line for line in self._lines.values() if line.parcels]

    def _send_next(self, line: Line) -> bool:
        """Send a line's next parcel, or give it up; False where the decode node has to catch up first."""
        parcel = line.parcels[0]  # no other thread takes any
        try:
            if not parcel.request.is_dropped:
                if not self._takes(line, parcel):
                    return False
                self._send(parcel)
        except ChannelError as error:
            request_id = parcel.request.asked.request_id
            logger.warning("%s: latents of %s: %s", self._endpoint.name, request_id, error)
            self._on_failed(parcel.request)
        except Exception:
            logger.exception("%s: latents could not be sent", self._endpoint.name)
            self._on_failed(parcel.request)
        with self._lock:
            line.parcels.popleft()
            line.queued_bytes -= parcel.size_bytes
            self._tidy(parcel.request.asked.decode_address)
        self._on_room()
        return True

    def _send(self, parcel: Parcel) -> None:
        asked = parcel.request.asked
        channel = self._channel(asked.decode_address)
        if parcel.latents is None:
            DECODE_DOWN.send(channel, FirstToken(asked.request_id, asked.generation, parcel.token_id))
            return
        latents = parcel.latents.wait()
        part = latents if channel.carries_tensors else as_bytes(latents)
        code = None if channel.carries_tensors else checksum([part])
        span = (parcel.layer, parcel.begin, parcel.end, NAMES[latents.dtype], code)
        DECODE_DOWN.send(channel, Latents(asked.request_id, asked.generation, *span), [part])
        self.sent_bytes += part.nbytes

    def _takes(self, line: Line, parcel: Parcel) -> bool:
        """Whether a channel has room for a parcel; raises ChannelTimeout for one that nobody empties."""
        channel, now_s = line.channel, time.monotonic()
        unsent_bytes = 0 if channel is None else channel.pending_bytes
        if not unsent_bytes or unsent_bytes + parcel.size_bytes <= UNSENT_BYTES_MAX:
            line.unsent_bytes = 0
            return True
        if unsent_bytes != line.unsent_bytes:  # nothing is added meanwhile: some was taken
            line.unsent_bytes, line.progress_s = unsent_bytes, now_s
        since_s = max(line.progress_s, channel.joined_s)  # nothing can leave before two GPUs are joined
        if now_s - since_s <= UNSENT_TIMEOUT_S:
            return False
        self._shun(parcel.request.asked.decode_address)
        channel.end()  # its endpoint closes it, which may wait for GPUs to let go
        raise ChannelTimeout(f"the decode node took none of {unsent_bytes} bytes in {UNSENT_TIMEOUT_S} s")

    def _channel(self, address: str) -> StreamChannel:
        """The channel to a decode node; raises ConnectFailed, at once for an address that is shunned."""
        if time.monotonic() < self._shunned.get(address, 0.0):
            raise ConnectFailed(f"{address} failed less than {SHUNNED_S} s ago")
        with self._lock:
            line = self._lines[address]
            channel = line.channel
        if channel is None or channel.fileno() < 0:  # it may have gone before it was entered here
            try:
                channel = self._endpoint.connect(address, CONNECT_TIMEOUT_S)
            except ChannelError:
                self._shun(address)
                raise
            with self._lock:
                line.channel = channel
        return channel

    def _shun(self, address: str) -> None:
        now_s = time.monotonic()
        self._shunned = {other: end_s for other, end_s in self._shunned.items() if end_s > now_s}
        self._shunned[address] = now_s + SHUNNED_S

    def _tidy(self, address: str) -> None:
        line = self._lines[address]
        if not line.parcels and line.channel is None:
            del self._lines[address]
