"""A real server in this process: whatever goes wrong, the client reads a typed status and no secrets."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cluster.errors import (
    Internal,
    InvalidModel,
    InvalidRequest,
    NodeUnavailable,
    Overloaded,
    TriviumError,
    Unauthenticated,
)
from cluster.gateway_messages import admitted, delta
from cluster.gateway_status import ErrorInterceptor, to_rpc_status
from cluster.proto import trivium_pb2, trivium_pb2_grpc

MESSAGE_BYTES_MAX = 10_000
CORE_BYTES_MAX = 50_000
GENERATE = "/trivium.v1.Inference/Generate"
GET_MODEL = "/trivium.v1.Inference/GetModel"
SECRET = "/secret/path"


class FakeInference(trivium_pb2_grpc.InferenceServicer):
    """Raises what it is told to, or streams two events."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.closed = asyncio.Event()

    async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            yield admitted("r1", prompt_tokens_count=3, seed=5)
            if self.error is not None:
                raise self.error
            if request.text == "forever":
                while True:
                    yield delta("x", [1])
            yield delta(request.text, [1, 2])
        finally:
            self.closed.set()

    async def GetModel(self, request: Any, context: grpc.aio.ServicerContext) -> trivium_pb2.GetModelResponse:
        if self.error is not None:
            raise self.error
        return trivium_pb2.GetModelResponse(name="fake")

    async def GetCluster(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "by hand")


@asynccontextmanager
async def served() -> AsyncIterator[tuple[FakeInference, grpc.aio.Channel]]:
    interceptor = ErrorInterceptor(message_bytes_max=MESSAGE_BYTES_MAX)
    options = [("grpc.max_receive_message_length", CORE_BYTES_MAX)]
    server = grpc.aio.server(interceptors=[interceptor], options=options)
    servicer = FakeInference()
    trivium_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield servicer, channel
    finally:
        await server.stop(grace=None)


def with_server(test: Callable[[FakeInference, grpc.aio.Channel], Any]) -> Any:
    """Run a coroutine against a fresh server, and see that the server still answers after it."""

    async def run() -> Any:
        async with served() as (servicer, channel):
            result = await test(servicer, channel)
            servicer.error = None
            model = await trivium_pb2_grpc.InferenceStub(channel).GetModel(trivium_pb2.GetModelRequest())
            assert model.name == "fake"
            return result

    return asyncio.run(run())


async def status_of(call: Any) -> tuple[status_pb2.Status, list[Any]]:
    """Wait for a call to fail and return its rich status and the responses that came before."""
    responses = []
    try:
        if hasattr(call, "__aiter__"):
            async for response in call:
                responses.append(response)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        metadata = tuple(error.trailing_metadata())
        rich = dict(metadata).get("grpc-status-details-bin")
        assert rich is not None, error
        status = status_pb2.Status.FromString(rich)
        assert (status.code, status.message) == (error.code().value[0], error.details())
        return status, responses
    raise AssertionError("the call went well")


def detail_of(status: status_pb2.Status, kind: type) -> Any:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None


def test_an_invalid_request_names_its_field():
    error = InvalidRequest("OUT_OF_RANGE", "5 is too much", "sampling.top_p", "0 to 1", "Send less.")
    status = to_rpc_status(error)
    info = detail_of(status, error_details_pb2.ErrorInfo)
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (info.reason, info.domain) == ("OUT_OF_RANGE", "trivium")
    told = {"message": "5 is too much", "field": "sampling.top_p", "limit": "0 to 1", "remedy": "Send less."}
    assert dict(info.metadata) == told
    violation = detail_of(status, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field == "sampling.top_p" and "0 to 1" in violation.description
    assert detail_of(status, error_details_pb2.RetryInfo) is None


def test_overload_says_when_to_come_again():
    status = to_rpc_status(Overloaded("QUEUE_FULL", "no room", limit="8 requests", retry_after_s=1.5))
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert detail_of(status, error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds() == 1.5
    assert "8 requests" in detail_of(status, error_details_pb2.QuotaFailure).violations[0].description


@pytest.mark.parametrize("error", [Unauthenticated, NodeUnavailable, InvalidModel])
def test_every_error_carries_its_reason(error: type[TriviumError]):
    status = to_rpc_status(error("WHY", "it is so"))
    assert grpc.StatusCode[error.grpc_status].value[0] == status.code
    assert detail_of(status, error_details_pb2.ErrorInfo).reason == "WHY"
    assert rpc_status.to_status(status).code == grpc.StatusCode[error.grpc_status]


def test_what_goes_well_passes_through():
    async def test(servicer, channel):
        request = trivium_pb2.GenerateRequest(text="hi")
        return [event async for event in trivium_pb2_grpc.InferenceStub(channel).Generate(request)]

    events = with_server(test)
    assert [event.WhichOneof("event") for event in events] == ["admitted", "delta"]
    assert events[1].delta.text == "hi"


@pytest.mark.parametrize("method", ["GetModel", "Generate"])
def test_a_typed_error_keeps_its_type(method):
    async def test(servicer, channel):
        servicer.error = Overloaded("QUEUE_FULL", "no room", retry_after_s=2)
        call = getattr(trivium_pb2_grpc.InferenceStub(channel), method)
        request = trivium_pb2.GetModelRequest() if method == "GetModel" else trivium_pb2.GenerateRequest()
        return await status_of(call(request))

    status, responses = with_server(test)
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert detail_of(status, error_details_pb2.ErrorInfo).reason == "QUEUE_FULL"
    assert len(responses) == (method == "Generate")


@pytest.mark.parametrize("method", ["GetModel", "Generate"])
def test_a_surprise_is_told_by_id_and_logged_in_full(method, caplog):
    async def test(servicer, channel):
        servicer.error = FileNotFoundError(f"no {SECRET}")
        call = getattr(trivium_pb2_grpc.InferenceStub(channel), method)
        request = trivium_pb2.GetModelRequest() if method == "GetModel" else trivium_pb2.GenerateRequest()
        return await status_of(call(request))

    with caplog.at_level(logging.ERROR, logger="cluster.gateway_status"):
        status, _ = with_server(test)
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert (
        SECRET.encode() not in status.SerializeToString()
        and b"FileNotFound" not in status.SerializeToString()
    )
    error_id = detail_of(status, error_details_pb2.ErrorInfo).metadata["error_id"]
    assert len(error_id) == 32 and error_id in status.message
    assert error_id in caplog.text and SECRET in caplog.text and method in caplog.text


def test_ids_of_surprises_differ():
    assert to_rpc_status(Internal("a")).message != to_rpc_status(Internal("b")).message


@pytest.mark.parametrize("payload", [b"\xff" * 40, b"\x0a\x05ab", b"\x0a\x02\xc3\x28", b"\x00garbage"])
@pytest.mark.parametrize("method", [GENERATE, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"])
def test_garbage_bytes_are_an_invalid_argument(payload, method):
    async def test(servicer, channel):
        streams = method in (GENERATE, "/grpc.health.v1.Health/Watch")
        return await status_of((channel.unary_stream if streams else channel.unary_unary)(method)(payload))

    status, responses = with_server(test)
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert detail_of(status, error_details_pb2.ErrorInfo).reason == "UNDECODABLE_MESSAGE"
    assert "trivium.proto" in detail_of(status, error_details_pb2.ErrorInfo).metadata["remedy"]
    assert responses == []


def test_a_message_above_our_limit_is_refused_with_all_details():
    async def test(servicer, channel):
        request = trivium_pb2.GenerateRequest(text="x" * MESSAGE_BYTES_MAX)
        return await status_of(trivium_pb2_grpc.InferenceStub(channel).Generate(request))

    status, _ = with_server(test)
    info = detail_of(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.metadata["limit"]) == ("MESSAGE_TOO_LARGE", f"{MESSAGE_BYTES_MAX} bytes")


def test_a_message_above_grpcs_own_cap_is_refused_unread():
    async def test(servicer, channel):
        request = trivium_pb2.GenerateRequest(text="x" * CORE_BYTES_MAX)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in trivium_pb2_grpc.InferenceStub(channel).Generate(request):
                pass
        return caught.value

    error = with_server(test)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(CORE_BYTES_MAX) in error.details()


def test_a_status_set_by_hand_and_an_unknown_method_stay_as_they_are(caplog):
    async def test(servicer, channel):
        codes = []
        for method in ["GetCluster", "GetNothing"]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/trivium.v1.Inference/{method}")(b"")
            codes.append(caught.value.code())
        return codes

    assert with_server(test) == [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED]
    assert caplog.text == "", "an abort is no surprise"


def test_a_cancelled_stream_closes_its_handler():
    async def test(servicer, channel):
        call = trivium_pb2_grpc.InferenceStub(channel).Generate(trivium_pb2.GenerateRequest(text="forever"))
        await call.read()
        call.cancel()
        await asyncio.wait_for(servicer.closed.wait(), timeout=5)

    with_server(test)


def test_handlers_that_write_by_themselves_still_work():
    async def test(servicer, channel):
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        response = await call.read()
        call.cancel()
        return response.status

    assert with_server(test) == health_pb2.HealthCheckResponse.SERVING
