"""Errors on the wire: google.rpc.Status with typed details, and the interceptor that lets only those out."""

import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.errors import Internal, InvalidRequest, Overloaded, TriviumError

DOMAIN = "trivium"

log = logging.getLogger(__name__)

Deserializer = Callable[[bytes], Any]


def to_rpc_status(error: TriviumError) -> status_pb2.Status:
    """Describe an error as google.rpc.Status: ErrorInfo always, then what its kind of error adds."""
    code, _ = grpc.StatusCode[error.grpc_status].value
    status = status_pb2.Status(code=code, message=str(error))
    for detail in _details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details(error: TriviumError) -> list[Message]:
    details: list[Message] = [_error_info(error)]
    if isinstance(error, InvalidRequest):
        details.append(_bad_request(error))
    if isinstance(error, Overloaded):
        details.append(_quota_failure(error))
    if error.retry_after_s is not None:
        details.append(_retry_info(error.retry_after_s))
    return details


def _error_info(error: TriviumError) -> error_details_pb2.ErrorInfo:
    metadata = {"message": error.message, "field": error.field, "limit": error.limit, "remedy": error.remedy}
    if isinstance(error, Internal):
        metadata["error_id"] = error.error_id
    told = {key: value for key, value in metadata.items() if value is not None}
    return error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=told)


def _bad_request(error: InvalidRequest) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.field or "", description=str(error), reason=error.reason
    )
    return error_details_pb2.BadRequest(field_violations=[violation])


def _quota_failure(error: Overloaded) -> error_details_pb2.QuotaFailure:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=error.field or "cluster", description=str(error)
    )
    return error_details_pb2.QuotaFailure(violations=[violation])


def _retry_info(retry_after_s: float) -> error_details_pb2.RetryInfo:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
    return retry


@dataclass(frozen=True)
class Unreadable:
    """Stands where a request should be, and carries why there is none."""

    error: InvalidRequest


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends each failed call with a typed status; a surprise is logged in full and told only as an error id.

    Requests above `message_bytes_max` are refused here with all details. gRPC's own cap answers with a bare
    RESOURCE_EXHAUSTED before any interceptor runs: set it somewhat higher.
    """

    def __init__(self, message_bytes_max: int) -> None:
        self._message_bytes_max = message_bytes_max

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler's deserializer and its behaviour; an unknown method stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return _guarded(handler, handler_call_details.method, self._message_bytes_max)


def _guarded(handler: grpc.RpcMethodHandler, method: str, message_bytes_max: int) -> grpc.RpcMethodHandler:
    behaviour, make_handler = _kind_of(handler)
    guard = _guarded_stream if inspect.isasyncgenfunction(behaviour) else _guarded_call
    return make_handler(
        guard(behaviour, method),
        request_deserializer=_never_raising(handler.request_deserializer, message_bytes_max),
        response_serializer=handler.response_serializer,
    )


def _kind_of(
    handler: grpc.RpcMethodHandler,
) -> tuple[Callable[..., Any], Callable[..., grpc.RpcMethodHandler]]:
    kinds = [
        (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    ]
    return next((behaviour, make) for behaviour, make in kinds if behaviour is not None)


def _never_raising(deserialize: Deserializer, message_bytes_max: int) -> Deserializer:
    """Turn bytes that are no message into an Unreadable: interceptors never see a deserializer's error."""

    def read(payload: bytes) -> Any:
        if len(payload) > message_bytes_max:
            return Unreadable(_too_large(len(payload), message_bytes_max))
        try:
            return deserialize(payload)
        except DecodeError:
            return Unreadable(_undecodable(len(payload)))

    return read


def _too_large(message_bytes: int, message_bytes_max: int) -> InvalidRequest:
    return InvalidRequest(
        reason="MESSAGE_TOO_LARGE",
        message=f"the message has {message_bytes} bytes",
        field="request",
        limit=f"{message_bytes_max} bytes",
        remedy="Send a shorter prompt.",
    )


def _undecodable(message_bytes: int) -> InvalidRequest:
    return InvalidRequest(
        reason="UNDECODABLE_MESSAGE",
        message=f"these {message_bytes} bytes are not the protobuf message that this method takes",
        field="request",
        limit="the types in trivium.proto, strings in UTF-8",
        remedy="Build the client from the trivium.proto of this server.",
    )


def _readable(request: Any) -> Any:
    if isinstance(request, Unreadable):
        raise request.error
    return request if not hasattr(request, "__aiter__") else _each_readable(request)


async def _each_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _guarded_call(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(_readable(request), context)
        except Exception as error:
            return await abort(context, error, method)

    return call


def _guarded_stream(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async with aclosing(behaviour(_readable(request), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await abort(context, error, method)

    return stream


async def abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    """End a call with the status of any exception; always raises grpc.aio.AbortError."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    told = error if isinstance(error, TriviumError) else _logged(error, method)
    await context.abort_with_status(rpc_status.to_status(to_rpc_status(told)))


def _logged(error: Exception, method: str) -> Internal:
    internal = Internal(error_id=uuid.uuid4().hex)
    log.error("error %s in %s", internal.error_id, method, exc_info=error)
    return internal
