"""The way in: a gRPC server of our own inside a Serve replica."""

import asyncio
import hmac
import logging
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.desk import Desk
from cluster.errors import InvalidConfig, Unauthenticated
from cluster.gateway_experts import ExpertsService
from cluster.gateway_operations import OperationsService
from cluster.gateway_service import InferenceService, ServedModel
from cluster.gateway_status import ErrorInterceptor, abort
from cluster.heartbeat import FAREWELL_S, Heartbeat, host_and_pid, member_name
from cluster.http_server import Application, LastingServer, metrics_application
from cluster.logs import begin_logs
from cluster.metrics import exposition, gateway_families
from cluster.place import Place, context_tokens_max
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from cluster.request_trace import RequestTraces
from cluster.tls import SCHEME, server_credentials
from cluster.token_file import read_token
from cluster.tokenizer import Tokenizer
from cluster.tracing import start_tracing, stop_tracing
from cluster.validation import RequestLimits
from cluster.view import DRAINING, READY, Member, View
from kernels.model.config import ModelConfig
from kernels.transport.spans import SpanLog

logger = logging.getLogger(__name__)

SERVICE = trivium_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
OPERATORS_SERVICES = tuple(
    trivium_pb2.DESCRIPTOR.services_by_name[name].full_name for name in ("Experts", "Operations")
)
MESSAGE_BYTES_PER_TOKEN = 16
MESSAGE_BYTES_MIN = 1 << 20
READ_BYTES_MAX = 128 << 20  # read whole and refused with a typed error; beyond it gRPC itself refuses
DRAIN_S = 600.0
NOTICED_S = 1.0  # in which balancers hear that this gateway drains
GRACE_S = 5.0
HEALTH_S = 0.1


class GatewayActor:
    """One gateway; several share a port."""

    kind = "gateway"

    async def __init__(self, place: Place, coordinator: Any, *pools: Any):
        """`pools` are handles that make them and this gateway one application for Serve."""
        self.name = member_name(self.kind)
        begin_logs(self.name, place.config.operations.json_logs)
        self.state = READY
        section = place.config.gateway
        model = served_model(place)
        self.desk = Desk(
            self.name, place.secret, place.config.transport.lease_s, section.requests_waiting_max
        )
        operations = place.config.operations
        spans = SpanLog()
        share = operations.traces_share if operations.traces_endpoint else 0.0
        traces = RequestTraces(spans, share, model.name)
        self._tracing = start_tracing(operations.traces_endpoint, self.kind, self.name, spans)
        self.service = InferenceService(model, self.desk, section.stall_timeout_s, traces)
        self.health = health.aio.HealthServicer()
        limit = section.message_bytes_max or max(
            MESSAGE_BYTES_MIN, MESSAGE_BYTES_PER_TOKEN * model.limits.context_tokens_max
        )
        tokens = Tokens(
            read_token(section.token_file, "gateway.token_file"),
            read_token(operations.token_file, "operations.token_file"),
            place.operations_token,
        )
        self.server = make_server(limit, tokens)
        trivium_pb2_grpc.add_InferenceServicer_to_server(self.service, self.server)
        trivium_pb2_grpc.add_ExpertsServicer_to_server(ExpertsService(coordinator), self.server)
        operators = OperationsService(coordinator, self.desk.router)
        trivium_pb2_grpc.add_OperationsServicer_to_server(operators, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        names = (SERVICE, *OPERATORS_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        credentials = server_credentials(section)
        self.port = bind(self.server, section.host, section.port, credentials)
        self.address = f"{SCHEME if credentials else ''}{section.host}:{self.port}"
        await self._set_health(False)
        await self.server.start()
        self.desk.start()
        self._monitored = await self._monitor(section.host, section.metrics_port)
        self._watching = asyncio.get_running_loop().create_task(self._keep_health())
        self.heartbeat = Heartbeat(coordinator, self.describe, self.on_view)
        self.heartbeat.start()
        await self._until_it_serves()

    async def _until_it_serves(self) -> None:
        """Return once a request would be served: whoever moves clients here when Serve says so loses none."""
        while not self.desk.can_serve and self.state == READY:
            await asyncio.sleep(HEALTH_S)

    def describe(self) -> Member:
        """This gateway, for the coordinator."""
        return Member(
            self.name,
            self.kind,
            self.address,
            self.state,
            report=self.desk.report(),
            **host_and_pid(),
        )

    async def on_view(self, view: View) -> None:
        """Know the newest nodes."""
        self.service.view = view
        await self.desk.follow(view)

    async def check_health(self) -> None:
        """Serve asks from time to time; an answer is enough."""

    async def __del__(self) -> None:
        """Take no new calls, finish those that run, then go."""
        self.state = DRAINING
        self._watching.cancel()
        await self._set_health(False)
        await self.heartbeat.announce(FAREWELL_S)
        await asyncio.sleep(NOTICED_S)
        closing = asyncio.get_running_loop().create_task(self.server.stop(DRAIN_S))  # refuses from now on
        while self.desk.requests_count and not closing.done():
            await asyncio.sleep(HEALTH_S)
        await self.heartbeat.stop()
        await self.server.stop(GRACE_S)  # those who watch health or hold a reflection stream stay no longer
        await closing
        self.desk.close()
        if self._monitored is not None:
            await self._monitored.stop()
        await stop_tracing(self._tracing)

    async def _monitor(self, host: str, port: int | None) -> LastingServer | None:
        """Serve this gateway's own metrics, if it has a port for them."""
        if port is None:
            return None
        server = LastingServer(self._monitors_application, host, port, "gateway.metrics_port")
        await server.begin()
        return server

    def _monitors_application(self) -> Application:
        return metrics_application(self._metrics, lambda: self.desk.can_serve)

    async def _metrics(self, accept: str) -> tuple[bytes, str]:
        return exposition(gateway_families(self.describe(), self.service.view), accept)

    async def _keep_health(self) -> None:
        """Say by health whether a request could be served, as the nodes themselves tell."""
        while True:
            await self._set_health(self.desk.can_serve)
            await asyncio.sleep(HEALTH_S)

    async def _set_health(self, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", SERVICE):
            await self.health.set(service, status)


def served_model(place: Place) -> ServedModel:
    """The model's face; without tokenizer.json it takes and gives token ids only."""
    folder = place.config.model.folder
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    limits = RequestLimits(
        config.vocab_size, context_tokens_max(config, place.config), place.config.gateway.tokens_max_default
    )
    return ServedModel(place.config.model.served_name, config, tokenizer, limits)


@dataclass(frozen=True)
class Tokens:
    """What calls must carry: clients theirs, operators theirs; where neither has one, all is open."""

    clients: str | None = field(default=None, repr=False)
    operators: str | None = field(default=None, repr=False)
    page: str = field(default="", repr=False)
    """The Pools page's, which operators must carry where clients have a token and they have none."""

    def accepted(self, service: str) -> tuple[str, ...]:
        """The tokens of which calls of a service must carry one; none where it is open."""
        operators = self.operators or (self.clients and (self.page or self.clients))
        if operators and service in OPERATORS_SERVICES:
            return (operators,)
        known = (self.clients, self.operators, self.page) if self.clients else ()
        return tuple(token for token in known if token)


def make_server(message_bytes_max: int, tokens: Tokens) -> grpc.aio.Server:
    """A server whose every error is typed and whose limits are ours.

    It has no limit on concurrent calls: gRPC would refuse those for health by it, too.
    """
    interceptors = [TokenInterceptor(tokens), ErrorInterceptor(message_bytes_max)]
    return grpc.aio.server(
        interceptors=interceptors,
        options=[
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", max(READ_BYTES_MAX, 2 * message_bytes_max)),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ],
    )


def bind(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None
) -> int:
    """The port that the server listens on, by TLS with credentials; raises InvalidConfig if it is taken."""
    try:
        if credentials is not None:
            return server.add_secure_port(f"{host}:{port}", credentials)
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise InvalidConfig(
            reason="PORT_TAKEN",
            message=f"{host}:{port} cannot be listened on",
            field="gateway.port",
            remedy="Name a free port, or 0 for any.",
        ) from error


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the bearer token before anything of them is read; health needs none."""

    def __init__(self, tokens: Tokens):
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Any, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        """The handler, or one that refuses."""
        handler = await continuation(details)
        service = details.method.split("/")[1]
        accepted = self._tokens.accepted(service)
        if handler is None or not accepted or service == health.SERVICE_NAME:
            return handler
        sent = str(dict(details.invocation_metadata).get("authorization", "")).encode()
        if any([hmac.compare_digest(sent, f"Bearer {token}".encode()) for token in accepted]):
            return handler
        return refusing(details.method, service in OPERATORS_SERVICES)


def refusing(method: str, for_operators: bool) -> grpc.RpcMethodHandler:
    """A handler that answers Unauthenticated; as one for streams it reads no message before it does."""
    whose = "the operators' token, that of operations.token_file" if for_operators else "the clients' token"
    error = Unauthenticated(
        reason="NO_TOKEN",
        message="the call carries no valid token",
        field="authorization",
        limit=whose,
        remedy="Send the metadata `authorization: Bearer TOKEN`.",
    )

    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error, method)

    return grpc.stream_stream_rpc_method_handler(refuse)
