"""Where latents leave prefill: frames go out in order while the next layer is computed.

A thread of its own adds the checksum and hands each frame to the channel, which the endpoint's thread then
empties; computing never waits for a decode node.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from decode.messages import DOWN as DECODE_DOWN
from decode.messages import FirstToken, Latents, checksum
from kernels.model.host_copies import HostCopy, own_stream
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError, ChannelTimeout
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import NAMES, as_bytes
from prefill.request import PrefillRequest

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
UNSENT_BYTES_MAX = 128 << 20  # on one channel, before the outbox waits for the decode node
UNSENT_TIMEOUT_S = 10.0
QUEUED_BYTES_MAX = 1 << 30  # of all parcels together, before who computes them waits
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


class Outbox:
    """Sends parcels to the decode nodes that their requests have reservations on."""

    def __init__(
        self,
        endpoint: Endpoint,
        on_failed: Callable[[PrefillRequest], None],
        device: torch.device = HOST,
    ):
        """Latents come from `device`."""
        self.sent_bytes = 0
        self._device = device
        self._queued_bytes = 0
        self._room = threading.Condition()
        self._endpoint = endpoint
        self._on_failed = on_failed
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._channels: dict[str, StreamChannel] = {}
        self._unsent_bytes: Counter[StreamChannel] = Counter()
        self._thread: threading.Thread | None = None

    def put(self, parcel: Parcel) -> None:
        """Queue a parcel, when there is room for it; its latents must not change any more."""
        with self._room:
            self._queued_bytes += parcel.size_bytes
        self._parcels.put(parcel)
        if self._thread is None:
            self.send_all()
            return
        with self._room:  # who computes faster than anybody takes waits, and does not run out of memory
            self._room.wait_for(lambda: self._queued_bytes <= QUEUED_BYTES_MAX, UNSENT_TIMEOUT_S)

    def start(self) -> None:
        """Send in a thread of its own until closed."""
        self._thread = threading.Thread(target=self._run, name=f"{self._endpoint.name}-outbox", daemon=True)
        self._thread.start()

    def send_all(self) -> None:
        """Send what is queued now, on the caller's thread."""
        while not self._parcels.empty():
            parcel = self._parcels.get()
            self._leave(parcel)
            self._send(parcel)

    def forget(self, channel: StreamChannel) -> list[str]:
        """Connect anew to a decode node whose channel has closed; its address, if it was one."""
        with self._lock:
            lost = [address for address, known in self._channels.items() if known is channel]
            for address in lost:
                del self._channels[address]
            self._unsent_bytes.pop(channel, None)
        return lost

    def close(self) -> None:
        """Stop after what is queued."""
        self._parcels.put(None)
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        with own_stream(self._device):  # so that what leaves waits for its own computing alone
            while (parcel := self._parcels.get()) is not None:
                try:
                    self._send(parcel)
                except Exception:
                    logger.exception("%s: latents could not be sent", self._endpoint.name)
                    self._on_failed(parcel.request)
                finally:
                    self._leave(parcel)

    def _leave(self, parcel: Parcel) -> None:
        with self._room:
            self._queued_bytes -= parcel.size_bytes
            self._room.notify_all()

    def _send(self, parcel: Parcel) -> None:
        if parcel.request.is_dropped:
            return
        asked = parcel.request.asked
        try:
            channel = self._channel(asked.decode_address)
            if parcel.latents is None:
                DECODE_DOWN.send(channel, FirstToken(asked.request_id, asked.generation, parcel.token_id))
                return
            latents = parcel.latents.wait()
            part = latents if channel.carries_tensors else as_bytes(latents)
            code = None if channel.carries_tensors else checksum([part])
            span = (parcel.layer, parcel.begin, parcel.end, NAMES[latents.dtype], code)
            self._wait_for_room(channel, part.nbytes)
            DECODE_DOWN.send(channel, Latents(asked.request_id, asked.generation, *span), [part])
            self.sent_bytes += part.nbytes
        except ChannelError as error:
            logger.warning("%s: latents of %s: %s", self._endpoint.name, asked.request_id, error)
            self._on_failed(parcel.request)

    def _wait_for_room(self, channel: StreamChannel, size_bytes: int) -> None:
        """Let a decode node that falls behind catch up; raises ChannelTimeout, having closed its channel."""
        with self._lock:
            unsent = self._unsent_bytes[channel] if channel.has_pending else 0
            self._unsent_bytes[channel] = unsent + size_bytes
        if unsent + size_bytes <= UNSENT_BYTES_MAX or self._thread is None:
            return
        try:
            channel.flush(UNSENT_TIMEOUT_S)
        except ChannelTimeout:
            channel.close()
            raise

    def _channel(self, address: str) -> StreamChannel:
        with self._lock:
            channel = self._channels.get(address)
        if channel is None or channel.fileno() < 0:  # it may have gone before it was entered here
            channel = self._endpoint.connect(address, CONNECT_TIMEOUT_S)
            with self._lock:
                self._channels[address] = channel
        return channel
