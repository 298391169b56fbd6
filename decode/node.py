"""One GPU, or one CPU process, that turns latents into tokens, one step at a time."""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from decode.batcher import DecodeBatcher
from decode.config import DecodeConfig
from decode.graphs import CudaRecorder
from decode.inbox import Inbox
from decode.messages import (
    DOWN,
    UP,
    AskReport,
    AwaitPages,
    CancelRequest,
    ExtendLeases,
    FirstToken,
    Latents,
    LatentsReceived,
    NodeReport,
    RequestFailed,
    ReservePages,
    TokenChunk,
    TokenChunks,
    TokenLogprob,
)
from decode.request import DecodeRequest
from decode.step import DecodeStep
from experts.errors import ExpertsError
from experts.messages import DispatchReport
from kernels.model.host_copies import check_device
from kernels.model.latent_cache import LatentCache
from kernels.model.pages import PagesLost
from kernels.model.step_watch import StepsFail, StepWatch
from kernels.model.transformer import Transformer
from kernels.ops.sample import Samples, sample_each
from kernels.transport.channel import Channel
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError
from kernels.transport.frame import Frame, Header
from kernels.transport.spans import UNTRACED, SpanLog

logger = logging.getLogger(__name__)

IDLE_S = 0.5
SWEEP_S = 1.0
FAILED = "the decode node failed"
LEASE_ENDED = "nobody extended its lease in time"


class DecodeNode:
    """Latents come in by its endpoint, tokens leave to gateways; `step` is all that computes."""

    def __init__(
        self, config: DecodeConfig, transformer: Transformer, clock: Callable[[], float] = time.monotonic
    ):
        model = transformer.config
        self.config = config
        layout = transformer.latent_layout(config.packs_latents)
        self.cache = LatentCache(model.layers_count, layout, config.latents_bytes, transformer.device)
        self.batcher = DecodeBatcher(config.requests_max)
        self.failures: Counter[str] = Counter()
        self.tokens_count = 0
        self.steps_count = 0
        self.busy_s = 0.0
        self.latents_bytes = 0
        self.receiving_s = 0.0
        self.experts_epoch: Callable[[], int] = lambda: 0
        self.dispatch_report: Callable[[], DispatchReport] = DispatchReport
        self.trace_dispatches: Callable[[str], None] = lambda place: None
        self.spans = SpanLog()
        self._model = model
        make_recorder = CudaRecorder if transformer.device.type == "cuda" else None
        self.decode_step = DecodeStep(transformer, self.cache, config.micro_batches, make_recorder)
        self.decode_step.prepare(range(1, config.requests_max + 1))
        self._clock = clock
        self._watch = StepWatch(config.step_s_max, clock)
        self._receiving: dict[Channel, tuple[float, int]] = {}
        self._cancelled: set[tuple[str, int]] = set()
        self._gone: set[Channel] = set()
        self._extended: set[str] = set()
        self._swept_s = clock()
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        heeds = (self._on_frame, self._on_closed, self._choose_buffers)
        addresses = [config.address, *filter(None, [config.latents_address])]
        self.endpoints = [Endpoint(address, config.secret, config.name, *heeds) for address in addresses]
        self.endpoint = self.endpoints[0]
        self.inbox = Inbox(self.cache, self.endpoints[-1].address, config.lease_s, clock)

    @property
    def is_alive(self) -> bool:
        """Whether its computing thread runs, and comes to the end of its steps."""
        return self._thread is not None and self._thread.is_alive() and not self._watch.is_stuck

    def start(self) -> None:
        """Receive and compute in threads of their own until closed."""
        for endpoint in self.endpoints:
            endpoint.start()
        self._thread = threading.Thread(target=self._run, name=f"{self.config.name}-compute", daemon=True)
        self._thread.start()

    def step(self) -> int:
        """Admit what has arrived, run a step, give each request in it its next token; how many there were."""
        self._drop_cancelled()
        batch = self._next_batch()
        if not batch:
            return 0
        begin_s = time.perf_counter()
        self.trace_dispatches(place_of_first_step(batch))
        try:
            logits = self.decode_step.run(batch)
            rows = [request.sample_row(self._model.eos_token_ids) for request in batch]
            samples, failed = sample_each(logits, rows)
        except ExpertsError as error:
            self._fail(batch, "experts_unavailable", str(error), retryable=True)
            return len(batch)
        except Exception:
            logger.exception("%s: a step of %d requests failed", self.config.name, len(batch))
            self._seek_guilty(batch)
            return len(batch)
        if len(failed) == len(batch):
            self._note_failure(batch)
        elif len(batch) == self.batcher.requests_running_count:
            self._watch.succeeded()  # some alone, while others are suspected, prove nothing
        self._finish(batch, samples, failed)
        self.busy_s += time.perf_counter() - begin_s
        return len(batch)

    def report(self) -> NodeReport:
        """Numbers about this node; safe from any thread."""
        pool = self.cache.pool
        refused_count = sum(endpoint.counts.refused_peers_count for endpoint in self.endpoints)
        with self._lock:
            running_count = self.batcher.requests_running_count
            waiting_count = self.batcher.requests_waiting_count + len(self.inbox)
            failures = dict(self.failures)
        return NodeReport(
            name=self.config.name,
            kind="decode",
            address=self.endpoint.address,
            requests_running_count=running_count,
            requests_waiting_count=waiting_count,
            tokens_waiting_count=0,
            pages_total_count=pool.pages_count,
            pages_free_count=pool.pages_free_count,
            pages_cached_count=pool.pages_cached_count,
            pages_leased_count=pool.pages_leased_count,
            pages_arriving_count=self.inbox.pages_count,
            tokens_count=self.tokens_count,
            steps_count=self.steps_count,
            experts_epoch=self.experts_epoch(),
            refused_frames_count=self.inbox.refused_count + refused_count,
            failures=failures,
            busy_s=self.busy_s,
            latents_bytes=self.latents_bytes,
            receiving_s=self.receiving_s,
            dispatch=self.dispatch_report(),
        )

    def close(self) -> None:
        """Stop both threads and free the address; raises StepsFail while a step goes on."""
        self._stopping = True
        self._work.set()
        if self._thread is not None:
            self._thread.join(0 if self._watch.is_stuck else self.config.step_s_max)
        self._close_endpoints()
        if self._thread is not None and self._thread.is_alive():
            raise StepsFail(f"{self.config.name} has closed, but its step goes on: the process has to end")

    def _close_endpoints(self) -> None:
        for endpoint in self.endpoints:
            endpoint.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            logger.exception("%s: cannot even fail a request, and leaves", self.config.name)
            self._close_endpoints()  # so that everyone sees at once that nobody computes here

    def _turn(self) -> None:
        self._work.clear()  # before looking for work, so that what comes meanwhile is not slept through
        try:
            with self._watch.step():
                self._sweep_running()
                count = self.step()
            if count == 0 and not self._work.wait(IDLE_S):
                self._sweep()
                self.inbox.check()
        except PagesLost:
            raise
        except Exception:
            logger.exception("%s: a turn failed", self.config.name)
            self._fail(self.batcher.everyone(), "internal", FAILED, retryable=True)
            self._note_failure()

    def _seek_guilty(self, batch: list[DecodeRequest]) -> None:
        """After an unforeseen error have its requests step one at a time; one that was alone fails."""
        if len(batch) == 1:
            self._fail(batch, "internal", FAILED, retryable=True)
        else:
            self.batcher.suspect(batch)
        self._note_failure(batch)

    def _note_failure(self, batch: Sequence[DecodeRequest] = ()) -> None:
        """Raises where this node is to leave: its device has failed, or its steps go on failing."""
        check_device(self.cache.latents.device)
        self._watch.failed(batch[0].asked.request_id if len(batch) == 1 else None)

    # what comes in, on the endpoint's thread

    def _choose_buffers(self, channel: Channel, header: Header) -> list[memoryview] | None:
        if header.kind != Latents.__name__:
            return []
        self._receiving[channel] = time.perf_counter(), header.payload_bytes
        latents = DOWN.read(header.kind, header.body)
        return self.inbox.choose_buffers(channel, latents, header.payload_bytes, any(header.on_device))

    def _on_frame(self, channel: Channel, frame: Frame) -> None:
        if frame.refused:
            return
        match DOWN.read_frame(frame):
            case Latents():
                self._latents_came(channel)
            case FirstToken() as first:
                self._first_token_came(channel, first)
            case ReservePages() as asked:
                UP.send(channel, self.inbox.reserve(asked, channel))
            case AwaitPages() as awaited:
                self.inbox.await_pages(awaited, channel)
            case CancelRequest(request_id, generation):
                self._cancel(request_id, generation)
            case ExtendLeases(request_ids):
                self.inbox.extend(request_ids)
                with self._lock:
                    self._extended.update(request_ids)
                self._sweep()
            case AskReport():
                UP.send(channel, self.report())

    def _latents_came(self, channel: Channel) -> None:
        begin_s, size_bytes = self._receiving.pop(channel)
        self.receiving_s += time.perf_counter() - begin_s
        self.latents_bytes += size_bytes
        damaged = self.inbox.received(channel)
        if damaged is not None:
            self._tell_failed([damaged], "latents_damaged", "latents arrived damaged", retryable=True)

    def _first_token_came(self, channel: Channel, first: FirstToken) -> None:
        request = self.inbox.first_token(first)
        if request is None:
            return
        if request.cancelled:
            self._tell_failed([request], "latents_missing", "some latents never came", retryable=True)
            return
        self._work.set()
        UP.send(channel, LatentsReceived(first.request_id, first.generation))

    def _cancel(self, request_id: str, generation: int) -> None:
        if not self.inbox.cancel(request_id, generation):
            with self._lock:
                self._cancelled.add((request_id, generation))
            self._work.set()

    def _on_closed(self, channel: Channel) -> None:
        self._receiving.pop(channel, None)
        unfinished = self.inbox.channel_closed(channel)
        self.inbox.cancel_of(channel)
        with self._lock:
            self._gone.add(channel)
        self._work.set()
        self._tell_failed(unfinished, "prefill_lost", "the prefill node went away", retryable=True)

    def _sweep(self) -> None:
        self._tell_failed(self.inbox.sweep(), "lease_ended", LEASE_ENDED, retryable=True)

    # what goes on, on the computing thread

    def _sweep_running(self) -> None:
        """Extend or end the leases of what runs: a gateway that is cut off cannot say that it has gone."""
        now_s = self._clock()
        if now_s < self._swept_s + SWEEP_S:
            return
        self._swept_s = now_s
        self.inbox.check_stranded()
        with self._lock:
            extended, self._extended = self._extended, set()
        everyone = self.batcher.everyone()
        for request in everyone:
            if request.asked.request_id in extended:
                request.lease_end_s = now_s + self.config.lease_s
        ended = [request for request in everyone if request.lease_end_s < now_s]
        self._fail(ended, "lease_ended", LEASE_ENDED, retryable=True)

    def _next_batch(self) -> list[DecodeRequest]:
        with self._lock:  # so that no report misses a request on its way from inbox to batcher
            complete = self.inbox.take_complete()
            self.batcher.admit(complete)
            batch = self.batcher.next_batch()
        for request in complete:
            request.begin(self._model.vocab_size, self._clock())
            self.spans.record("latents", request.asked.traceparent, request.reserved_s, request.begun_s)
        return batch

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled, self._cancelled = dict(sorted(self._cancelled)), set()
            gone, self._gone = self._gone, set()
        if not cancelled and not gone:
            return
        self._release(
            [
                request
                for request in self.batcher.everyone()
                if request.gateway in gone
                or cancelled.get(request.asked.request_id, -1) >= request.asked.generation
            ]
        )

    def _finish(self, batch: list[DecodeRequest], samples: Samples, failed: dict[int, str]) -> None:
        chunks: dict[Channel, list[TokenChunk]] = defaultdict(list)
        ended: list[DecodeRequest] = []
        for row, request in enumerate(batch):
            if row in failed:
                continue
            chunk = self._next_chunk(request, samples, row)
            chunks[request.gateway].append(chunk)
            if chunk.finish_reason is not None:
                ended.append(request)
        self.tokens_count += len(batch) - len(failed)
        self.steps_count += 1
        self._release(ended)
        for gateway, some in chunks.items():
            self._tell(gateway, TokenChunks(tuple(some)))
        if len(failed) == len(batch) > 1:  # hardly by the fault of each
            self._fail(batch, "internal", FAILED, retryable=True)
        else:
            for row, reason in failed.items():
                self._fail([batch[row]], "no_next_token", reason, retryable=False)

    def _next_chunk(self, request: DecodeRequest, samples: Samples, row: int) -> TokenChunk:
        asked, token_id, index = request.asked, samples.token_ids[row], request.outputs_count
        request.append(token_id)
        reason = asked.sampling.finish_reason(token_id, index + 1, self._model.eos_token_ids)
        found = samples.logprobs[row]
        logprobs = () if found is None else (TokenLogprob(found.chosen, tuple(found.top)),)
        return TokenChunk(asked.request_id, asked.generation, index, (token_id,), reason, logprobs)

    def _release(self, requests: Iterable[DecodeRequest]) -> None:
        requests = list(requests)
        self.batcher.remove(requests)
        for request in requests:
            self.inbox.release(request)
            request.note(self.spans, self._clock())

    def _fail(self, requests: Sequence[DecodeRequest], reason: str, message: str, retryable: bool) -> None:
        self._release(requests)
        self._tell_failed(requests, reason, message, retryable)

    def _tell_failed(
        self, requests: Sequence[DecodeRequest], reason: str, message: str, retryable: bool
    ) -> None:
        for request in requests:
            with self._lock:
                self.failures[reason] += 1
            asked = request.asked
            self._tell(
                request.gateway, RequestFailed(asked.request_id, asked.generation, reason, message, retryable)
            )

    def _tell(self, gateway: Channel, message: TokenChunks | RequestFailed) -> None:
        try:
            UP.send(gateway, message)
        except ChannelError:
            logger.info("%s: gateway %s has gone", self.config.name, gateway.peer)


def place_of_first_step(batch: Sequence[DecodeRequest]) -> str:
    """Place in a trace of a request whose first step this is; further ones look like it."""
    return next((request.place for request in batch if request.place and request.is_at_first_step), UNTRACED)
