"""One GPU, or one CPU process, that turns latents into tokens, one step at a time."""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch

from decode.batcher import DecodeBatcher
from decode.config import DecodeConfig
from decode.inbox import Inbox
from decode.messages import (
    DOWN,
    UP,
    AskReport,
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
from kernels.model.latent_cache import LatentCache
from kernels.model.transformer import Transformer
from kernels.ops.sample import SampleError, Samples, sample
from kernels.transport.channel import Channel
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError
from kernels.transport.frame import Frame, Header

logger = logging.getLogger(__name__)

IDLE_S = 0.5


class DecodeNode:
    """Latents come in by its endpoint, tokens leave to gateways; `step` is all that computes."""

    def __init__(
        self, config: DecodeConfig, transformer: Transformer, clock: Callable[[], float] = time.monotonic
    ):
        model = transformer.config
        self.config = config
        self.cache = LatentCache(
            model.layers_count, model.latent_dim, transformer.dtype, config.latents_bytes
        )
        self.batcher = DecodeBatcher(config.requests_max)
        self.failures: Counter[str] = Counter()
        self.tokens_count = 0
        self.steps_count = 0
        self.busy_s = 0.0
        self.experts_epoch: Callable[[], int] = lambda: 0
        self._model = model
        self.decode_step = DecodeStep(transformer, self.cache, config.micro_batches)
        self._clock = clock
        self._cancelled: set[tuple[str, int]] = set()
        self._gone: set[Channel] = set()
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.endpoint = Endpoint(
            config.address, config.secret, config.name, self._on_frame, self._on_closed, self._choose_buffers
        )
        self.inbox = Inbox(self.cache, self.endpoint.address, config.lease_s, clock)

    def start(self) -> None:
        """Receive and compute in threads of their own until closed."""
        self.endpoint.start()
        self._thread = threading.Thread(target=self._run, name=f"{self.config.name}-compute", daemon=True)
        self._thread.start()

    def step(self) -> int:
        """Admit what has arrived, run one step, give each request in it its next token; how many were in it."""
        self._drop_cancelled()
        self._admit(self.inbox.take_complete())
        batch = self.batcher.next_batch()
        if not batch:
            return 0
        begin_s = time.perf_counter()
        try:
            samples, failed = self._sample(batch, self.decode_step.run(batch))
        except ExpertsError as error:
            self._fail(batch, "experts_unavailable", str(error), retryable=True)
            return 0
        self._finish(batch, samples, failed)
        self.busy_s += time.perf_counter() - begin_s
        return len(batch)

    def report(self) -> NodeReport:
        """Numbers about this node."""
        pool = self.cache.pool
        return NodeReport(
            name=self.config.name,
            kind="decode",
            address=self.endpoint.address,
            requests_running_count=self.batcher.requests_running_count,
            requests_waiting_count=self.batcher.requests_waiting_count + len(self.inbox),
            tokens_waiting_count=0,
            pages_total_count=pool.pages_count,
            pages_free_count=pool.pages_free_count,
            pages_cached_count=pool.pages_cached_count,
            pages_leased_count=pool.pages_leased_count,
            tokens_count=self.tokens_count,
            steps_count=self.steps_count,
            experts_epoch=self.experts_epoch(),
            refused_frames_count=self.inbox.refused_count + self.endpoint.counts.refused_peers_count,
            failures=dict(self.failures),
            busy_s=self.busy_s,
        )

    def close(self) -> None:
        """Stop both threads and free the address."""
        self._stopping = True
        self._work.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.endpoint.close()

    def _run(self) -> None:
        while not self._stopping:
            self._work.clear()  # before looking for work, so that what comes meanwhile is not slept through
            try:
                if self.step() == 0 and not self._work.wait(IDLE_S):
                    self._sweep()
                    self.inbox.check()
            except Exception:
                logger.exception("%s: a step failed", self.config.name)
                self._fail(self.batcher.everyone(), "internal", "the decode node failed", retryable=True)

    # what comes in, on the endpoint's thread

    def _choose_buffers(self, channel: Channel, header: Header) -> list[memoryview] | None:
        if header.kind != Latents.__name__:
            return []
        return self.inbox.choose_buffers(channel, DOWN.read(header.kind, header.body), header.payload_bytes)

    def _on_frame(self, channel: Channel, frame: Frame) -> None:
        if frame.refused:
            return
        match DOWN.read_frame(frame):
            case Latents():
                self._latents_came(channel)
            case FirstToken() as first:
                if self.inbox.first_token(first) is not None:
                    UP.send(channel, LatentsReceived(first.request_id, first.generation))
                    self._work.set()
            case ReservePages() as asked:
                UP.send(channel, self.inbox.reserve(asked, channel))
            case CancelRequest(request_id, generation):
                self._cancel(request_id, generation)
            case ExtendLeases(request_ids):
                self.inbox.extend(request_ids)
                self._sweep()
            case AskReport():
                UP.send(channel, self.report())

    def _latents_came(self, channel: Channel) -> None:
        damaged = self.inbox.received(channel)
        if damaged is not None:
            self._tell_failed([damaged], "latents_damaged", "latents arrived damaged", retryable=True)

    def _cancel(self, request_id: str, generation: int) -> None:
        if not self.inbox.cancel(request_id, generation):
            with self._lock:
                self._cancelled.add((request_id, generation))
            self._work.set()

    def _on_closed(self, channel: Channel) -> None:
        self.inbox.channel_closed(channel)
        self.inbox.cancel_of(channel)
        with self._lock:
            self._gone.add(channel)
        self._work.set()

    def _sweep(self) -> None:
        self._tell_failed(
            self.inbox.sweep(), "lease_ended", "its latents did not come in time", retryable=True
        )

    # what goes on, on the computing thread

    def _admit(self, requests: list[DecodeRequest]) -> None:
        for request in requests:
            request.begin(self._model.vocab_size)
        self.batcher.admit(requests)

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

    def _sample(self, batch: list[DecodeRequest], logits: torch.Tensor) -> tuple[Samples, dict[int, str]]:
        """Next tokens, and why some requests have none; those are sampled greedily from zeros and then failed."""
        rows = [request.sample_row(self._model.eos_token_ids) for request in batch]
        try:
            return sample(logits, rows), {}
        except SampleError as error:
            logits = logits.clone()
            logits[list(error.reasons)] = 0.0
            return sample(logits, rows), error.reasons

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

    def _fail(self, requests: Sequence[DecodeRequest], reason: str, message: str, retryable: bool) -> None:
        self._release(requests)
        self._tell_failed(requests, reason, message, retryable)

    def _tell_failed(
        self, requests: Sequence[DecodeRequest], reason: str, message: str, retryable: bool
    ) -> None:
        for request in requests:
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
