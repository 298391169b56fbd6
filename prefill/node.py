"""One GPU, or one CPU process, that turns prompts into latents and a first token."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from decode.messages import UP as DECODE_UP
from decode.messages import AskReport, CancelRequest, LatentsReceived, NodeReport, RequestFailed
from experts.errors import ExpertsError
from experts.messages import DispatchReport
from kernels.model.host_copies import HostCopies, check_device
from kernels.model.latent_cache import LatentCache
from kernels.model.pages import PagesExhausted, PagesLost
from kernels.model.step_watch import StepsFail, StepWatch
from kernels.model.transformer import Transformer
from kernels.ops.sample import Samples, sample_each
from kernels.transport.channel import Channel
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError
from kernels.transport.frame import Frame
from kernels.transport.sockets import is_between_devices
from kernels.transport.spans import UNTRACED, SpanLog, place_under
from prefill.batcher import PrefillBatcher
from prefill.config import PrefillConfig
from prefill.messages import DOWN, UP, FirstTokenChunk, HandedOver, PrefillPrompt
from prefill.outbox import Outbox, Parcel
from prefill.prefix import PrefixPages
from prefill.request import Chunk, PrefillRequest
from prefill.step import PrefillStep

logger = logging.getLogger(__name__)

IDLE_S = 0.5
FAILED = "the prefill node failed"
UNREACHABLE = "latents could not be sent to the decode node"


class PrefillNode:
    """Prompts come in by its endpoint, latents leave by its outbox; `step` is all that computes."""

    def __init__(
        self, config: PrefillConfig, transformer: Transformer, clock: Callable[[], float] = time.monotonic
    ):
        model = transformer.config
        self.config = config
        layout = transformer.latent_layout(config.packs_latents)
        self.cache = LatentCache(model.layers_count, layout, config.latents_bytes, transformer.device)
        self.prefix = PrefixPages(self.cache.pool)
        self.batcher = PrefillBatcher(config.step_tokens_max, config.requests_max)
        self.failures: Counter[str] = Counter()
        self.tokens_count = 0
        self.cached_tokens_count = 0
        self.steps_count = 0
        self.transfer_s = 0.0
        self.busy_s = 0.0
        self.experts_epoch: Callable[[], int] = lambda: 0
        self.dispatch_report: Callable[[], DispatchReport] = DispatchReport
        self.trace_dispatches: Callable[[str], None] = lambda place: None
        self.spans = SpanLog()
        self._model = model
        self.prefill_step = PrefillStep(transformer, self.cache, config.micro_batches)
        self._clock = clock
        self._watch = StepWatch(config.step_s_max, clock)
        self._copies = HostCopies()
        self._lock = threading.Lock()
        self._arrived: list[PrefillRequest] = []
        self._ended: list[tuple[str, int]] = []
        self._gone: set[Channel] = set()
        self._lost: set[str] = set()
        self._in_transfer: dict[tuple[str, int], PrefillRequest] = {}
        self._work = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.endpoint = Endpoint(config.address, config.secret, config.name, self._on_frame, self._on_closed)
        self.outbox = Outbox(self.endpoint, self._transfer_failed, self._work.set, transformer.device)

    @property
    def is_alive(self) -> bool:
        """Whether it computes and sends: both threads run, and steps come to their ends."""
        is_running = self._thread is not None and self._thread.is_alive()
        return is_running and self.outbox.is_alive and not self._watch.is_stuck

    def start(self) -> None:
        """Receive, compute and send in threads of their own until closed."""
        self.endpoint.start()
        self.outbox.start()
        self._thread = threading.Thread(target=self._run, name=f"{self.config.name}-compute", daemon=True)
        self._thread.start()

    def step(self) -> int:
        """Begin what there is room for, compute a step's chunks, send what came out; how much was done."""
        self._take_events()
        self._begin_waiting()
        queued_count = sum(map(self._queue_cached, self.batcher.everyone()))
        is_common = not self.batcher.has_suspects
        chunks = self.batcher.next_batch(self._may_go)
        if not chunks:
            return queued_count
        begin_s = time.perf_counter()
        places = (chunk.request.place for chunk in chunks)
        self.trace_dispatches(next(filter(None, places), UNTRACED))
        last = [chunk for chunk in chunks if chunk.is_last]
        complete = [chunk.request for chunk in last]
        try:
            logits = self.prefill_step.run(chunks, self._queue_computed)
            samples, failed = self._sample(complete, logits)
        except ExpertsError as error:
            for chunk in chunks:
                self._fail(chunk.request, "experts_unavailable", str(error), retryable=True)
            return len(chunks)
        except Exception:
            logger.exception("%s: a step of %d prompts failed", self.config.name, len(chunks))
            self._seek_guilty(chunks)
            return len(chunks)
        if len(failed) < len(complete):
            if is_common:
                self._watch.succeeded()  # some alone, while others are suspected, prove nothing
        elif complete:  # without any, nobody has looked whether there are numbers
            self._note_failure(last)
        self.tokens_count += sum(chunk.tokens_count for chunk in chunks)
        self.steps_count += 1
        self._finish(complete, samples, failed)
        self.batcher.finish(chunks)
        self.busy_s += time.perf_counter() - begin_s
        return len(chunks)

    def report(self) -> NodeReport:
        """Numbers about this node; safe from any thread."""
        pool = self.cache.pool
        with self._lock:
            running_count = self.batcher.requests_running_count + len(self._in_transfer)
            waiting_count = self.batcher.requests_waiting_count + len(self._arrived)
            failures = dict(self.failures)
        return NodeReport(
            name=self.config.name,
            kind="prefill",
            address=self.endpoint.address,
            requests_running_count=running_count,
            requests_waiting_count=waiting_count,
            tokens_waiting_count=self.batcher.tokens_waiting_count,
            pages_total_count=pool.pages_count,
            pages_free_count=pool.pages_free_count,
            pages_cached_count=pool.pages_cached_count,
            pages_leased_count=pool.pages_leased_count,
            tokens_count=self.tokens_count,
            steps_count=self.steps_count,
            experts_epoch=self.experts_epoch(),
            refused_frames_count=self.endpoint.counts.refused_peers_count,
            failures=failures,
            transfer_s=self.transfer_s,
            busy_s=self.busy_s,
            cached_tokens_count=self.cached_tokens_count,
            latents_bytes=self.outbox.sent_bytes,
            dispatch=self.dispatch_report(),
        )

    def close(self) -> None:
        """Stop all threads and free the address; raises StepsFail while a step goes on."""
        self._stopping = True
        self._work.set()
        if self._thread is not None:
            self._thread.join(0 if self._watch.is_stuck else self.config.step_s_max)
        self.outbox.close()
        self.endpoint.close()
        if self._thread is not None and self._thread.is_alive():
            raise StepsFail(f"{self.config.name} has closed, but its step goes on: the process has to end")

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            logger.exception("%s: cannot even fail a request, and leaves", self.config.name)
            self.endpoint.close()  # so that everyone sees at once that nobody computes here

    def _turn(self) -> None:
        self._work.clear()  # before looking for work, so that what comes meanwhile is not slept through
        try:
            with self._watch.step():
                count = self.step()
            if count == 0 and not self._work.wait(IDLE_S):
                self.cache.pool.check()
        except PagesLost:
            raise
        except Exception:
            logger.exception("%s: a turn failed", self.config.name)
            for request in self.batcher.everyone():
                self._fail(request, "internal", FAILED, retryable=True)
            self._note_failure()

    def _seek_guilty(self, chunks: list[Chunk]) -> None:
        """After an unforeseen error have its prompts step one at a time; one that was alone fails."""
        if len(chunks) == 1:
            self._fail(chunks[0].request, "internal", FAILED, retryable=True)
        else:
            self.batcher.suspect(chunks)
        self._note_failure(chunks)

    def _note_failure(self, chunks: Sequence[Chunk] = ()) -> None:
        """Raises where this node is to leave: its device has failed, or its steps go on failing."""
        check_device(self.cache.latents.device)
        self._watch.failed(chunks[0].request.asked.request_id if len(chunks) == 1 else None)

    # what comes in, on the endpoint's thread

    def _on_frame(self, channel: Channel, frame: Frame) -> None:
        if frame.kind == LatentsReceived.__name__:
            self._handed_over(DECODE_UP.read_frame(frame))
            return
        match DOWN.read_frame(frame):
            case PrefillPrompt() as asked:
                with self._lock:
                    self._arrived.append(PrefillRequest(asked, channel, self._clock()))
            case CancelRequest(request_id, generation):
                with self._lock:
                    self._ended.append((request_id, generation))
            case AskReport():
                UP.send(channel, self.report())
                return
        self._work.set()

    def _handed_over(self, received: LatentsReceived) -> None:
        with self._lock:
            request = self._in_transfer.pop((received.request_id, received.generation), None)
        if request is not None:
            now_s = self._clock()
            transfer_s = now_s - request.computed_s
            self.transfer_s += transfer_s
            self.spans.record("transfer", request.asked.traceparent, request.computed_s, now_s)
            self._tell(request, HandedOver(received.request_id, received.generation, transfer_s))

    def _on_closed(self, channel: Channel) -> None:
        lost = self.outbox.forget(channel)
        with self._lock:
            self._gone.add(channel)
            self._lost.update(lost)
        self._work.set()

    def _transfer_failed(self, request: PrefillRequest) -> None:
        """The outbox cannot reach the decode node: tell the gateway once, and stop computing the prompt."""
        if request.is_dropped:
            return
        request.is_dropped = True
        with self._lock:
            self._in_transfer.pop(request.key, None)
            self._ended.append(request.key)
        self._tell_failed(request, "decode_unreachable", UNREACHABLE, retryable=True)
        self._work.set()

    # what goes on, on the computing thread

    def _take_events(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
            ended, self._ended = dict(sorted(self._ended)), []
            gone, self._gone = self._gone, set()
            lost, self._lost = self._lost, set()
            for request in arrived:
                self.batcher.add(request)
            held = [*self.batcher.everyone(), *self._in_transfer.values()] if ended or gone or lost else []
        for request in arrived:
            problem = request.problem(self.cache.pool.pages_count, self._model.vocab_size)
            if problem is not None:
                self._fail(request, "invalid_prompt", problem, retryable=False)
            elif not request.has_address:
                self._fail(request, "decode_unreachable", UNREACHABLE, retryable=True)
        for request in held:
            if request.gateway in gone or ended.get(request.asked.request_id, -1) >= request.asked.generation:
                self._drop(request)
            elif request.asked.decode_address in lost:
                self._fail(request, "decode_unreachable", UNREACHABLE, retryable=True)

    def _begin_waiting(self) -> None:
        while (request := self.batcher.next_waiting()) is not None:
            try:
                self.prefix.begin(request)
            except PagesExhausted:
                return  # pages come back when a prompt ends
            request.begun_s = self._clock()
            request.place = place_under(request.asked.traceparent)
            with self._lock:  # so that no report misses a request between waiting and running
                self.batcher.begin(request)
            self.cached_tokens_count += request.cached_tokens_count
            if not request.ends_at_once:
                request.queued_counts = [0] * self._model.layers_count

    def _may_go(self, request: PrefillRequest) -> bool:
        """Whether a prompt's next latents can be queued once they are computed, or nobody wants them."""
        has_room = not request.queued_counts or self.outbox.has_room(request.asked.decode_address)
        return request.is_prefix_queued and has_room

    def _queue_cached(self, request: PrefillRequest) -> int:
        """Queue layers of a known prefix as far as there is room for them; how many."""
        tokens_count, address = request.cached_tokens_count, request.asked.decode_address
        if request.is_prefix_queued or not self.outbox.has_room(address):
            return 0
        first = layer = request.queued_counts.index(0)
        slots = self.prefill_step.prefix_slots(request.pages, tokens_count)
        while layer < self._model.layers_count and self.outbox.has_room(address):
            self._queue(request, layer, 0, tokens_count, self.prefill_step.cached_latents(slots, layer))
            layer += 1
        return layer - first

    def _queue_computed(self, chunk: Chunk, layer: int, latents: torch.Tensor) -> None:
        if not (queued_counts := chunk.request.queued_counts):
            return
        begin = max(chunk.begin, queued_counts[layer])  # a step that failed may have come further
        if begin < chunk.end:
            self._queue(chunk.request, layer, begin, chunk.end, latents[begin - chunk.begin :])

    def _queue(
        self, request: PrefillRequest, layer: int, begin: int, end: int, latents: torch.Tensor
    ) -> None:
        """Send latents on their way to where the channel to their decode node takes them from."""
        request.queued_counts[layer] = end
        is_to_host = not is_between_devices(request.asked.decode_address)
        self.outbox.put(Parcel(request, layer, begin, end, self._copies.begin(latents, is_to_host)))

    def _sample(
        self, complete: Sequence[PrefillRequest], logits: torch.Tensor
    ) -> tuple[Samples, dict[int, str]]:
        if not complete:
            return Samples([], []), {}
        model = self._model
        rows = [request.sample_row(model.eos_token_ids, model.vocab_size) for request in complete]
        return sample_each(logits, rows)

    def _finish(self, complete: Sequence[PrefillRequest], samples: Samples, failed: dict[int, str]) -> None:
        for row, request in enumerate(complete):
            request.computed_s = self._clock()
            if row in failed:  # its pages may hold no numbers either: nobody is to find them
                if len(failed) == len(complete) > 1:  # hardly by the fault of each
                    self._fail(request, "internal", FAILED, retryable=True)
                else:
                    self._fail(request, "no_next_token", failed[row], retryable=False)
                continue
            self.prefix.remember(request)
            self.prefix.end(request)
            if not request.is_dropped:
                self._hand_over(request, samples, row)

    def _hand_over(self, request: PrefillRequest, samples: Samples, row: int) -> None:
        chunk = request.chunk(samples, row, self._model.eos_token_ids)
        prefill_s = request.computed_s - request.begun_s
        # the client first: else the outbox's thread has its turn now, and decode's token overtakes this one
        self._tell(request, FirstTokenChunk(chunk, request.cached_tokens_count, prefill_s))
        if chunk.finish_reason is None:
            with self._lock:
                self._in_transfer[request.key] = request
            self.outbox.put(Parcel(request, 0, 0, 0, None, samples.token_ids[row]))
        else:
            request.is_dropped = True  # what of it still waits in the outbox is of use to nobody
        request.note(self.spans)

    def _drop(self, request: PrefillRequest) -> None:
        request.is_dropped = True
        with self._lock:
            self._in_transfer.pop(request.key, None)
            self.batcher.remove(request)
        if request.pages:
            self.prefix.end(request)

    def _fail(self, request: PrefillRequest, reason: str, message: str, retryable: bool) -> None:
        is_told = request.is_dropped
        self._drop(request)
        if not is_told:
            self._tell_failed(request, reason, message, retryable)

    def _tell_failed(self, request: PrefillRequest, reason: str, message: str, retryable: bool) -> None:
        with self._lock:
            self.failures[reason] += 1
        asked = request.asked
        self._tell(request, RequestFailed(asked.request_id, asked.generation, reason, message, retryable))

    def _tell(self, request: PrefillRequest, message: FirstTokenChunk | HandedOver | RequestFailed) -> None:
        try:
            UP.send(request.gateway, message)
        except ChannelError:
            logger.info("%s: gateway %s has gone", self.config.name, request.gateway.peer)
