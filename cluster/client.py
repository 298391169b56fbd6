"""A client of trivium.v1.Inference: requests as plain values in, events as plain values out."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cluster import gateway_messages as wire
from cluster.errors import InvalidRequest, NodeUnavailable, TriviumError
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.tls import open_channel
from cluster.validation import RequestedGeneration

FINISH_REASONS = {
    trivium_pb2.FINISH_REASON_STOP: "stop",
    trivium_pb2.FINISH_REASON_LENGTH: "length",
    trivium_pb2.FINISH_REASON_STOP_STRING: "stop_string",
}
ERRORS = {error.grpc_status: error for error in TriviumError.__subclasses__() if error.__name__ != "Internal"}
MESSAGE_BYTES_MAX = 64 << 20


@dataclass(frozen=True)
class Admitted:
    """The request runs; `seed` is what its tokens are drawn with."""

    request_id: str
    prompt_tokens_count: int
    seed: int


@dataclass(frozen=True)
class Delta:
    """New text and tokens."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[wire.TokenLogprob, ...]


@dataclass(frozen=True)
class Finished:
    """The end, and where the time went."""

    finish_reason: str
    usage: wire.Usage
    timing: wire.Timing


class Client:
    """One channel, and one connection, to the gateways at an address."""

    def __init__(self, address: str, token: str | None = None):
        """`address` is host:port, or grpcs://host:port for TLS; raises InvalidConfig."""
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),  # else the clients of one process share a connection
        ]
        self._address = address
        self._channel = open_channel(address, options)
        self._stub = trivium_pb2_grpc.InferenceStub(self._channel)
        self._experts = trivium_pb2_grpc.ExpertsStub(self._channel)
        self._operations = trivium_pb2_grpc.OperationsStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def generate(
        self, request: RequestedGeneration, timeout_s: float | None = None
    ) -> AsyncIterator[Admitted | Delta | Finished]:
        """Stream a generation; raises TriviumError. Leaving the loop early cancels the request."""
        call = self._stub.Generate(as_message(request), timeout=timeout_s, metadata=self._metadata)
        has_begun = False
        try:
            async for response in call:
                has_begun = True
                yield read_response(response)
        except grpc.aio.AioRpcError as error:
            raise_typed(error, self._address, has_begun)
        finally:
            call.cancel()

    async def get_model(self, timeout_s: float = 10.0) -> trivium_pb2.GetModelResponse:
        """Which model is served; raises TriviumError."""
        return await self._call(self._stub.GetModel, trivium_pb2.GetModelRequest(), timeout_s)

    async def get_cluster(self, timeout_s: float = 10.0) -> trivium_pb2.GetClusterResponse:
        """Which nodes and shards there are; raises TriviumError."""
        return await self._call(self._stub.GetCluster, trivium_pb2.GetClusterRequest(), timeout_s)

    async def get_experts(self, timeout_s: float = 10.0) -> trivium_pb2.GetExpertsResponse:
        """Where experts are and how loaded each shard is; raises TriviumError."""
        return await self._call(self._experts.GetExperts, trivium_pb2.GetExpertsRequest(), timeout_s)

    async def plan_experts(self, timeout_s: float = 30.0) -> trivium_pb2.ExpertsPlan:
        """What a rebalance would do now; raises TriviumError."""
        return await self._call(self._experts.PlanExperts, trivium_pb2.PlanExpertsRequest(), timeout_s)

    async def move_experts(
        self,
        layers: Sequence[trivium_pb2.LayerOfExperts],
        placement_epoch: int,
        timeout_s: float = 30.0,
    ) -> trivium_pb2.ExpertsPlan:
        """Move experts from the placement in force to the homes given; raises TriviumError."""
        request = trivium_pb2.MoveExpertsRequest(layers=layers, placement_epoch=placement_epoch)
        return await self._call(self._experts.MoveExperts, request, timeout_s)

    async def get_pools(self, timeout_s: float = 10.0) -> trivium_pb2.GetPoolsResponse:
        """How many actors each pool has, and why; raises TriviumError."""
        return await self._call(self._operations.GetPools, trivium_pb2.GetPoolsRequest(), timeout_s)

    async def scale_pool(
        self, kind: str, count: int | None, by: str = "", timeout_s: float = 15.0
    ) -> trivium_pb2.GetPoolsResponse:
        """Set a pool's count, or without one hold what it has, until released; raises TriviumError."""
        request = trivium_pb2.ScalePoolRequest(kind=kind, count=count, by=by)
        return await self._call(self._operations.ScalePool, request, timeout_s)

    async def release_pool(self, kind: str, timeout_s: float = 10.0) -> trivium_pb2.GetPoolsResponse:
        """Let the load decide about a pool again; raises TriviumError."""
        request = trivium_pb2.ReleasePoolRequest(kind=kind)
        return await self._call(self._operations.ReleasePool, request, timeout_s)

    async def get_requests(
        self, requests_max: int = 0, timeout_s: float = 10.0
    ) -> trivium_pb2.GetRequestsResponse:
        """Which requests of the gateway have been under way longest; raises TriviumError."""
        request = trivium_pb2.GetRequestsRequest(requests_max=requests_max)
        return await self._call(self._operations.GetRequests, request, timeout_s)

    async def is_serving(self, timeout_s: float = 2.0) -> bool:
        """Whether a request would be served now, by the standard health call."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def _call(self, method: Any, message: Any, timeout_s: float) -> Any:
        try:
            return await method(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise_typed(error, self._address)


def as_message(request: RequestedGeneration) -> trivium_pb2.GenerateRequest:
    """A request as it travels; raises InvalidRequest for numbers and texts that no message can hold."""
    try:
        return wire.from_requested(request)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            reason="UNSENDABLE",
            message=f"the request cannot be sent: {error}",
            field="request",
            limit="numbers of 32 bits, seeds of 64, texts in Unicode",
            remedy="Correct the value.",
        ) from error


def read_response(response: trivium_pb2.GenerateResponse) -> Admitted | Delta | Finished:
    """One event of a stream as a plain value."""
    if response.HasField("admitted"):
        event = response.admitted
        return Admitted(event.request_id, event.prompt_tokens_count, event.seed)
    if response.HasField("delta"):
        event = response.delta
        return Delta(event.text, tuple(event.token_ids), tuple(map(wire.to_logprob, event.logprobs)))
    event = response.finished
    return Finished(
        FINISH_REASONS.get(event.finish_reason, ""), wire.to_usage(event.usage), wire.to_timing(event.timing)
    )


def raise_typed(error: grpc.aio.AioRpcError, address: str, has_begun: bool = False) -> NoReturn:
    """Raise the TriviumError that the server meant, or else what the transport's own failure means."""
    info, retry_after_s = read_details(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and info is None:
        raise unreached(error.details(), address, has_begun) from error
    made = ERRORS.get(error.code().name, TriviumError)
    fields = dict(info.metadata) if info is not None else {}
    raise made(
        reason=info.reason if info is not None else error.code().name,
        message=fields.get("message") or error.details() or "the call failed",
        field=fields.get("field"),
        limit=fields.get("limit"),
        remedy=fields.get("remedy"),
        retry_after_s=retry_after_s,
    ) from error


def unreached(details: str | None, address: str, has_begun: bool) -> NodeUnavailable:
    """What is told where no gateway has spoken, or the one that spoke has gone."""
    details = (details or "the transport does not say why").rstrip(".")
    if has_begun:
        return NodeUnavailable(
            reason="STREAM_BROKEN",
            message=f"the gateway went away in the midst of the stream: {details}",
            remedy="Send the request again.",
        )
    return NodeUnavailable(
        reason="NO_SERVER",
        message=f"nobody answers at {address}: {details}",
        field="address",
        remedy="Start a cluster with `trivium serve`, or name another --address.",
    )


def read_details(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    """The ErrorInfo and the retry time in seconds that a status carries, where it does."""
    status = rpc_status.from_call(error)
    info = retry = None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
    return info, None if retry is None else retry.retry_delay.ToTimedelta().total_seconds()


def read_plan(text: str) -> trivium_pb2.ExpertsPlan:
    """A plan from the JSON that `as_values` makes of it; raises InvalidRequest."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("a plan is an object")
        return ParseDict(values, trivium_pb2.ExpertsPlan())
    except (ValueError, ParseError) as error:
        raise no_plan("this is not a plan of experts") from error


def no_plan(message: str, limit: str | None = None) -> InvalidRequest:
    """What is told of a file, or its text, that is no plan of experts."""
    return InvalidRequest(
        reason="NO_PLAN",
        message=message,
        field="PLAN",
        limit=limit,
        remedy="Write one: `trivium experts plan --output plan.json`.",
    )


def as_values(message: Message) -> dict[str, Any]:
    """A response as values for JSON, every field of it, under the names in trivium.proto."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
