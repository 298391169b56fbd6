"""The three calls of trivium.v1.Inference."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from cluster import gateway_messages as wire
from cluster.desk import Desk, Output
from cluster.errors import Cancelled
from cluster.events import DeliverTokens, FinishRequest, RoutedRequest
from cluster.gateway_report import GatewayReport
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.request_trace import TRACEPARENT, RequestTrace, RequestTraces
from cluster.text_stream import TextDelta, TextStream
from cluster.tokenizer import Tokenizer
from cluster.validation import RequestedGeneration, RequestLimits, ValidRequest, validate
from cluster.view import DRAINING, READY, STARTING, Member, View
from decode.messages import LENGTH, NodeReport, TokenLogprob
from kernels.model.config import ModelConfig
from kernels.transport.spans import SpanLog

KINDS = {
    "gateway": trivium_pb2.NODE_KIND_GATEWAY,
    "prefill": trivium_pb2.NODE_KIND_PREFILL,
    "decode": trivium_pb2.NODE_KIND_DECODE,
}
STATES = {
    STARTING: trivium_pb2.STATE_STARTING,
    READY: trivium_pb2.STATE_READY,
    DRAINING: trivium_pb2.STATE_DRAINING,
}
COUNTS = (
    "requests_running_count",
    "requests_waiting_count",
    "pages_total_count",
    "pages_free_count",
    "pages_cached_count",
    "pages_leased_count",
)
STOP_STRING = "stop_string"
VALIDATED_INLINE_BYTES = 4096  # longer requests are read and tokenised in a thread
VALIDATING_THREADS = 4

Responses = AsyncIterator[trivium_pb2.GenerateResponse]


@dataclass(frozen=True)
class ServedModel:
    """The model as clients see it."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    limits: RequestLimits


class InferenceService(trivium_pb2_grpc.InferenceServicer):
    """Turns calls into requests at the desk, and what they bring into responses."""

    def __init__(
        self, model: ServedModel, desk: Desk, stall_timeout_s: float, traces: RequestTraces | None = None
    ):
        self.view = View()
        self._traces = traces or RequestTraces(SpanLog(), 0.0, model.name)
        self._model = model
        self._desk = desk
        self._stall_timeout_s = stall_timeout_s
        self._validating = ThreadPoolExecutor(VALIDATING_THREADS, "validate")

    async def Generate(self, request: trivium_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """Validate, admit, stream; a call that ends early ends its request."""
        sent = dict(context.invocation_metadata()).get(TRACEPARENT)
        called_s = time.monotonic()
        trace = self._traces.begin(sent, called_s, random.random())
        try:
            await self._generate(request, context, trace, called_s)
        except BaseException as error:
            trace.failed(error)
            raise
        finally:
            trace.end(time.monotonic())

    async def _generate(
        self,
        request: trivium_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext,
        trace: RequestTrace,
        called_s: float,
    ) -> None:
        with self._desk.entering():
            requested, valid = await self._validated(request)
        request_id = self._desk.new_request_id()
        trace.asked(requested, valid, request_id)
        routed = RoutedRequest(
            request_id,
            valid.token_ids,
            valid.sampling,
            valid.priority,
            trace.place,
            valid.client_request_id,
        )
        try:
            self._desk.admit(routed, called_s)
            await self._write(context, wire.admitted(request_id, len(valid.token_ids), valid.sampling.seed))
            async for response in self._responses(request_id, valid, trace):
                await self._write(context, response)
        finally:
            self._desk.leave(request_id)

    async def GetModel(
        self, request: trivium_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.GetModelResponse:
        """Which model is served."""
        model, config = self._model, self._model.config
        return trivium_pb2.GetModelResponse(
            name=model.name,
            family=config.family,
            vocab_size=config.vocab_size,
            context_tokens_max=model.limits.context_tokens_max,
            layers_count=config.layers_count,
            experts_count=config.routed_experts_count,
            experts_per_token_count=config.gate.experts_per_token if config.gate else 0,
            shared_experts_count=config.shared_experts_count,
            eos_token_ids=config.eos_token_ids,
            has_tokenizer=model.tokenizer is not None,
            has_chat_template=model.tokenizer is not None and model.tokenizer.has_chat_template,
        )

    async def GetCluster(
        self, request: trivium_pb2.GetClusterRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.GetClusterResponse:
        """Which nodes and shards there are, and how busy each is."""
        placement = self.view.placement_in_force
        return trivium_pb2.GetClusterResponse(
            nodes=[self._node(member) for member in self.view.members if member.kind in KINDS],
            shards=[_shard(member) for member in self.view.of_kind("experts") if member.report],
            placement_epoch=placement.epoch if placement else 0,
        )

    async def _validated(
        self, request: trivium_pb2.GenerateRequest
    ) -> tuple[RequestedGeneration, ValidRequest]:
        if request.ByteSize() < VALIDATED_INLINE_BYTES:
            return self._read(request)
        return await asyncio.get_running_loop().run_in_executor(self._validating, self._read, request)

    def _read(self, request: trivium_pb2.GenerateRequest) -> tuple[RequestedGeneration, ValidRequest]:
        requested = wire.to_requested(request)
        model = self._model
        return requested, validate(requested, model.limits, secrets.randbits(64), model.tokenizer)

    async def _write(self, context: grpc.aio.ServicerContext, response: trivium_pb2.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await context.write(response)
        except TimeoutError:
            raise Cancelled(
                reason="STREAM_STALLED",
                message="the stream was not read",
                field="gateway.stall_timeout_s",
                limit=f"{self._stall_timeout_s} s",
                remedy="Read the stream as it comes.",
            ) from None

    async def _responses(self, request_id: str, valid: ValidRequest, trace: RequestTrace) -> Responses:
        text = TextStream(
            self._model.tokenizer, valid.token_ids, valid.stop_strings, valid.sampling.tokens_min
        )
        sent_count, last_id = 0, 0
        async for outputs in self._desk.outputs(request_id):
            delta = Delta()
            finish = delta.take(outputs, text, self._model.tokenizer)
            sent_count += len(delta.token_ids)
            last_id = delta.token_ids[-1] if delta.token_ids else last_id
            if delta.matched is not None and finish is None:
                finish = self._desk.finish_now(request_id, STOP_STRING)
            if delta.token_ids or delta.text:
                yield wire.delta(delta.text, delta.token_ids, delta.logprobs)
            if finish is not None:
                trace.finished(finish, sent_count)
                usage = wire.Usage(len(valid.token_ids), finish.cached_tokens_count, sent_count)
                yield _finished(finish, delta.matched, last_id, usage)
                return

    def _node(self, member: Member) -> trivium_pb2.Node:
        known = self._desk.router.nodes.get(member.name)
        report = known.report if known is not None and known.report else member.report
        node = trivium_pb2.Node(name=member.name, kind=KINDS[member.kind], state=STATES[member.state])
        if isinstance(report, NodeReport):
            for count in COUNTS:
                setattr(node, count, getattr(report, count))
            node.tokens_per_s = self._desk.tokens_per_s.get(member.name, 0.0)
        elif isinstance(report, GatewayReport):
            node.requests_running_count = report.requests_count
        return node


class Delta:
    """What goes into one response: all that came since the last."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[wire.TokenLogprob] = []
        self.matched: str | None = None

    def take(
        self, outputs: list[Output], text: TextStream, tokenizer: Tokenizer | None
    ) -> FinishRequest | None:
        """Take what comes before a stop string; the finish, if the nodes have ended the request."""
        for output in outputs:
            if isinstance(output, FinishRequest):
                if self.matched is None:
                    self._add_text(text.flush())
                return output
            if self.matched is None:
                self._take_tokens(output, text, tokenizer)
        return None

    def _take_tokens(self, output: DeliverTokens, text: TextStream, tokenizer: Tokenizer | None) -> None:
        for index, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            if output.logprobs:
                self.logprobs.append(_logprob(token_id, output.logprobs[index], tokenizer))
            self._add_text(text.add(token_id))
            if self.matched is not None:
                return

    def _add_text(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.matched = delta.matched


def _finished(
    finish: FinishRequest, matched: str | None, last_id: int, usage: wire.Usage
) -> trivium_pb2.GenerateResponse:
    timing = wire.Timing(**vars(finish.phases))
    if matched is not None:
        return wire.finished_by_string(matched, usage, timing)
    if finish.finish_reason == LENGTH:
        return wire.finished_by_length(usage, timing)
    return wire.finished_by_token(last_id, usage, timing)


def _logprob(token_id: int, found: TokenLogprob, tokenizer: Tokenizer | None) -> wire.TokenLogprob:
    def text_of(token: int) -> str:
        return "" if tokenizer is None else tokenizer.decode([token])

    top = tuple(wire.TopLogprob(token, text_of(token), logprob) for token, logprob in found.top)
    return wire.TokenLogprob(token_id, text_of(token_id), found.chosen, top)


def _shard(member: Member) -> trivium_pb2.Shard:
    report = member.report
    return trivium_pb2.Shard(
        name=member.name,
        state=STATES[member.state],
        experts_count=report.experts_count,
        dispatches_count=report.dispatches_count,
        tokens_count=report.slots_count,
    )
