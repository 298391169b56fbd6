"""What takes turns in the simulator: gateways around real routers, and real nodes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.events import (
    Command,
    DeliverTokens,
    Event,
    FailRequest,
    FinishRequest,
    NodeJoined,
    NodeLost,
    NodeSaid,
    RoutedRequest,
    SayToNode,
    TimePassed,
)
from cluster.node_messages import read_from_node, send_to_node
from cluster.router import Router
from decode.messages import AskReport, NodeReport
from decode.node import DecodeNode
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel
from prefill.node import PrefillNode
from tests.cluster.books import check_books

SECRET = "in one process"
LEASE_S = 5.0

Node = PrefillNode | DecodeNode


@dataclass
class Client:
    """Who waits for a request, and what has come."""

    request: RoutedRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs_count: int = 0
    finish_reason: str = ""
    error: str = ""
    cancelled: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing more may come."""
        return bool(self.finish_reason or self.error or self.cancelled)


class Gateway:
    """A real router behind a real endpoint, driven turn by turn."""

    def __init__(self, name: str, address: str, clock: Callable[[], float], note: Callable[[str], None]):
        self.name = name
        self.router = Router(LEASE_S)
        self.clients: dict[str, Client] = {}
        self._channels: dict[str, StreamChannel] = {}
        self._clock = clock
        self._note = note
        self.endpoint = Endpoint(address, SECRET, name, self._on_frame, self._on_closed)

    def poll(self) -> int:
        """Hear what has come; how many frames."""
        return self.endpoint.poll(0)

    def tick(self, nodes: dict[str, Node], asks_reports: bool) -> None:
        """Look who is there, let time pass, perhaps ask for reports."""
        for name, node in nodes.items():
            if name not in self._channels:
                self._join(name, node)
        self.tell(TimePassed())
        for name in self._channels if asks_reports else ():
            self._send(name, AskReport())

    def tell(self, event: Event) -> None:
        """Tell the router, check its books, and do what it says."""
        if not isinstance(event, TimePassed) and not is_report(event):
            self._note(f"{self.name} ◀ {event}")
        commands = self.router.handle(event, self._clock())
        check_books(self.router)
        for command in commands:
            self._note(f"{self.name} ▶ {command}")
            self._do(command)

    def lose_clients(self) -> None:
        """Whoever still waits for something waits in vain."""
        for client in self.clients.values():
            client.cancelled = client.cancelled or not client.has_ended

    def close(self) -> None:
        """Die."""
        self.endpoint.close()

    def _join(self, name: str, node: Node) -> None:
        channel = self.endpoint.connect(node.endpoint.address)
        channel.peer = name
        self._channels[name] = channel
        kind = "prefill" if isinstance(node, PrefillNode) else "decode"
        self.tell(NodeJoined(name, kind))
        self._send(name, AskReport())

    def _send(self, name: str, message: object) -> None:
        try:
            if name in self._channels:
                send_to_node(self._channels[name], message)
        except ChannelError as error:
            self._note(f"{self.name}   cannot reach {name}: {error}")  # its end is heard at the next poll

    def _on_frame(self, channel: StreamChannel, frame: Frame) -> None:
        kind = self.router.nodes[channel.peer].kind
        self.tell(NodeSaid(channel.peer, read_from_node(kind, frame)))

    def _on_closed(self, channel: StreamChannel) -> None:
        del self._channels[channel.peer]
        self.tell(NodeLost(channel.peer))

    def _do(self, command: Command) -> None:
        match command:
            case SayToNode(name, message):
                self._send(name, message)
            case DeliverTokens(request_id, token_ids, logprobs):
                client = self._open_client(request_id)
                client.token_ids.extend(token_ids)
                client.logprobs_count += len(logprobs)
            case FinishRequest(request_id, reason):
                self._open_client(request_id).finish_reason = reason
            case FailRequest(request_id, reason, message):
                self._open_client(request_id).error = f"{reason}: {message}"

    def _open_client(self, request_id: str) -> Client:
        client = self.clients[request_id]
        assert not client.has_ended, f"something came for {request_id} after its end"
        return client


def is_report(event: Event) -> bool:
    """Whether an event brings but numbers, of which a story would be full."""
    return isinstance(event, NodeSaid) and isinstance(event.message, NodeReport)
