"""Where latents reach decode: room is reserved, frames are fenced, and a request leaves when it is complete.

The thread that receives and the thread that computes both come here; one lock guards the ledger. Pages that a
frame is being written to are never given away: a request that ends meanwhile keeps them until the frame has.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from decode.messages import (
    AwaitPages,
    FirstToken,
    Latents,
    PageReservation,
    ReservationRefused,
    ReservePages,
    checksum,
)
from decode.request import DecodeRequest
from kernels.model.host_copies import host_memory
from kernels.model.latent_cache import LatentCache, page_runs
from kernels.model.pages import PagesLost, pages_for
from kernels.transport.channel import Channel
from kernels.transport.frame import Part
from kernels.transport.tensors import NAMES, as_bytes

logger = logging.getLogger(__name__)

STRANDED_SHARE_MAX = 0.1


class Arriving:
    """A frame of latents that is being received: into its pages, or into the host's memory on their way."""

    def __init__(self, request: DecodeRequest, latents: Latents, cache: LatentCache, from_device: bool):
        self.request = request
        self.latents = latents
        layer = cache.latents[latents.layer]
        self._places = [layer[run] for run in page_runs(request.pages, latents.begin, latents.end)]
        self._memory = self._places
        if layer.is_cuda and not from_device:
            self._memory = [host_memory(place.shape, place.dtype) for place in self._places]
        self.buffers = self._memory if from_device else [as_bytes(memory) for memory in self._memory]

    @property
    def is_intact(self) -> bool:
        """Whether what has come is what was sent."""
        return self.latents.checksum is None or checksum(self.buffers) == self.latents.checksum

    def settle(self) -> None:
        """Bring what has come to its pages, if it is not there; the device does so before its next step."""
        for place, memory in zip(self._places, self._memory, strict=True):
            if memory is not place:
                place.copy_(memory, non_blocking=True)


class Inbox:
    """Reservations whose latents are on their way."""

    def __init__(self, cache: LatentCache, address: str, lease_s: float, clock: Callable[[], float]):
        self.refused_count = 0
        self._cache = cache
        self._address = address
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.RLock()
        self._waiting: dict[str, DecodeRequest] = {}
        self._receiving: dict[Channel, Arriving] = {}
        self._stranded: list[tuple[Channel, DecodeRequest]] = []
        self._awaiting: tuple[AwaitPages, Channel, float] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def pages_count(self) -> int:
        """Pages leased to requests that are not complete yet."""
        with self._lock:
            return sum(len(request.pages) for request in self._waiting.values())

    def reserve(self, asked: ReservePages, gateway: Channel) -> PageReservation | ReservationRefused:
        """Lease pages for a prompt and all its outputs to come; a newer generation replaces an older one.

        An older one than what waits here is refused, as is one for which all that is free is awaited.
        """
        tokens_count = asked.prompt_tokens_count + asked.sampling.tokens_max
        wanted = pages_for(max(tokens_count, len(asked.token_ids)))
        with self._lock:
            self._forget(asked.request_id, asked.generation)
            awaited_count = self._awaited_count(gateway)
            available = max(self._cache.pool.pages_available_count - awaited_count, 0)
            if asked.request_id in self._waiting or wanted > available:
                return ReservationRefused(asked.request_id, asked.generation, available)
            self._await_no_more(asked.request_id)  # it has come
            pages = self._cache.pool.lease(wanted)
            now_s = self._clock()
            counts = [0] * self._cache.layers_count
            request = DecodeRequest(
                asked,
                gateway,
                pages,
                now_s + self._lease_s,
                counts,
                list(asked.token_ids),
                reserved_s=now_s,
            )
            self._waiting[asked.request_id] = request
        return PageReservation(asked.request_id, asked.generation, self._address)

    def await_pages(self, awaited: AwaitPages, gateway: Channel) -> None:
        """Keep what comes free from other gateways for half a lease, unless one of them was first.

        Whose turn it is among a gateway's own requests is its affair: what it says last holds.
        """
        with self._lock:
            if not self._awaited_count(gateway):
                self._awaiting = awaited, gateway, self._clock() + self._lease_s / 2

    def choose_buffers(
        self, channel: Channel, latents: Latents, payload_bytes: int, from_device: bool = False
    ) -> Sequence[Part] | None:
        """Memory of the slots that a frame of latents is for, or None for one that fits no reservation.

        What comes from the peer's GPU goes straight to pages on ours.
        """
        with self._lock:
            request = self._waiting.get(latents.request_id)
            is_checked = (latents.checksum is None) == from_device
            if request is None or not is_checked or not self._fits(request, channel, latents, payload_bytes):
                self.refused_count += 1
                return None
            arriving = Arriving(request, latents, self._cache, from_device)
            request.receiving_count += 1
            request.prefill = channel
            self._receiving[channel] = arriving
            return arriving.buffers

    def received(self, channel: Channel) -> DecodeRequest | None:
        """Enter the frame that `channel` has just brought; the request itself if its bytes were damaged."""
        arriving = self._receiving[channel]
        request, latents = arriving.request, arriving.latents
        intact = arriving.is_intact
        with self._lock:
            if intact and not request.cancelled:
                arriving.settle()
            self._stop_receiving(channel)
            if request.cancelled:
                return None
            if not intact:
                self.refused_count += 1
                self._forget(latents.request_id, latents.generation)
                return request
            request.latents_counts[latents.layer] = latents.end
            request.lease_end_s = self._clock() + self._lease_s
        return None

    def first_token(self, first: FirstToken) -> DecodeRequest | None:
        """Note a request's first token, and return it: complete, or forgotten if latents are missing.

        A first token comes after all latents on the same channel, so what is missing then will never come.
        """
        with self._lock:
            request = self._waiting.get(first.request_id)
            if request is None or request.asked.generation != first.generation or request.first_token_known:
                self.refused_count += 1
                return None
            request.token_ids.append(first.token_id)
            request.first_token_known = True
            if not request.is_complete:
                self._forget(first.request_id, first.generation)
            return request

    def take_complete(self) -> list[DecodeRequest]:
        """Hand over the requests that can start, oldest first; their pages are the caller's to release."""
        with self._lock:
            complete = [request for request in self._waiting.values() if request.is_complete]
            for request in complete:
                del self._waiting[request.asked.request_id]
        return complete

    def cancel(self, request_id: str, generation: int) -> bool:
        """Forget a request that waits here, and what is kept for it of any generation; whether one waited."""
        with self._lock:
            self._await_no_more(request_id)
            return self._forget(request_id, generation)

    def cancel_of(self, gateway: Channel) -> None:
        """Forget the requests of a gateway that has gone."""
        with self._lock:
            if self._awaiting is not None and self._awaiting[1] is gateway:
                self._awaiting = None
            for request in [waiting for waiting in self._waiting.values() if waiting.gateway is gateway]:
                self._forget(request.asked.request_id, request.asked.generation)

    def channel_closed(self, channel: Channel) -> list[DecodeRequest]:
        """End the frame that a closed channel was in; forget and return the requests it left unfinished.

        Pages that a GPU may still write a frame to stay leased: they could be another request's.
        """
        with self._lock:
            if channel in self._receiving and channel.is_quiet:
                self._stop_receiving(channel)
            elif channel in self._receiving:
                self._strand(channel)
            brought = [request for request in self._waiting.values() if request.prefill is channel]
            unfinished = [request for request in brought if not request.is_complete]
            for request in unfinished:
                self._forget(request.asked.request_id, request.asked.generation)
        return unfinished

    def extend(self, request_ids: Sequence[str]) -> None:
        """Keep these requests' pages for another lease."""
        with self._lock:
            for request_id in request_ids:
                if request_id in self._waiting:
                    self._waiting[request_id].lease_end_s = self._clock() + self._lease_s

    def sweep(self) -> list[DecodeRequest]:
        """Free what nobody has extended in time, and return it; and pages that no GPU writes to any more."""
        with self._lock:
            quiet = [request for channel, request in self._stranded if channel.is_quiet]
            self._stranded = [pair for pair in self._stranded if pair[1] not in quiet]
            for request in quiet:
                self._end_frame(request)
            now_s = self._clock()
            ended = [request for request in self._waiting.values() if request.lease_end_s < now_s]
            for request in ended:
                self._forget(request.asked.request_id, request.asked.generation)
        return ended

    def release(self, request: DecodeRequest) -> None:
        """Give back the pages of a request that was handed over."""
        with self._lock:
            self._cache.pool.release(request.pages)

    def check(self) -> None:
        """Raises PagesLost if the ledger does not balance."""
        with self._lock:
            self._cache.pool.check()

    def check_stranded(self) -> None:
        """Raises PagesLost if GPUs have kept more pages than can be missed for longer than a lease lasts."""
        with self._lock:
            now_s = self._clock()
            late = [request for _, request in self._stranded if request.lease_end_s < now_s]
            pages_count = sum(len(request.pages) for request in late)
        if pages_count > STRANDED_SHARE_MAX * self._cache.pool.pages_count:
            raise PagesLost(f"other GPUs may still write to {pages_count} pages that nobody uses")

    def _awaited_count(self, gateway: Channel) -> int:
        """Pages that a request of another gateway than this one waits for."""
        if self._awaiting is None:
            return 0
        awaited, awaiting, end_s = self._awaiting
        return 0 if awaiting is gateway or end_s < self._clock() else awaited.pages_count

    def _await_no_more(self, request_id: str) -> None:
        if self._awaiting is not None and self._awaiting[0].request_id == request_id:
            self._awaiting = None

    def _fits(self, request: DecodeRequest, channel: Channel, latents: Latents, payload_bytes: int) -> bool:
        tokens_count = latents.end - latents.begin
        return (
            latents.generation == request.asked.generation
            and request.prefill in (None, channel)
            and 0 <= latents.layer < self._cache.layers_count
            and latents.begin == request.latents_counts[latents.layer]
            and latents.begin < latents.end <= len(request.asked.token_ids)
            and latents.dtype == NAMES[self._cache.latents.dtype]
            and payload_bytes == tokens_count * self._cache.layout.row_bytes
        )

    def _forget(self, request_id: str, generation: int) -> bool:
        request = self._waiting.get(request_id)
        if request is None or request.asked.generation > generation:
            return False
        del self._waiting[request_id]
        request.cancelled = True
        if request.receiving_count == 0:
            self._cache.pool.release(request.pages)
        return True

    def _strand(self, channel: Channel) -> None:
        request = self._receiving.pop(channel).request  # which goes on to count as receiving
        self._stranded.append((channel, request))
        logger.error(
            "%d pages of %s stay leased as long as the GPU of %s may write to them",
            len(request.pages),
            request.asked.request_id,
            channel.peer,
        )

    def _stop_receiving(self, channel: Channel) -> None:
        self._end_frame(self._receiving.pop(channel).request)

    def _end_frame(self, request: DecodeRequest) -> None:
        request.receiving_count -= 1
        if request.cancelled and request.receiving_count == 0:
            self._cache.pool.release(request.pages)
