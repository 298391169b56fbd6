"""What the router is told (past tense) and what it has done (imperative): plain data, no clock, no wire."""

from dataclasses import dataclass
from typing import Any

from decode.messages import SamplingParameters, TokenLogprob
from kernels.transport.spans import UNTRACED


@dataclass(frozen=True)
class RoutedRequest:
    """A valid request on its way to nodes."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParameters
    priority: int = 0
    traceparent: str = UNTRACED
    """Its place in a trace."""
    client_request_id: str = ""
    """What its client calls it."""


# events


@dataclass(frozen=True)
class RequestAdmitted:
    """A client's request is valid and wants its tokens."""

    request: RoutedRequest


@dataclass(frozen=True)
class RequestCancelled:
    """Nobody waits for a request any more."""

    request_id: str


@dataclass(frozen=True)
class NodeJoined:
    """A channel to a node is open."""

    name: str
    kind: str


@dataclass(frozen=True)
class NodeLost:
    """The channel to a node has closed, or the node has answered nothing for long."""

    name: str


@dataclass(frozen=True)
class NodeFellSilent:
    """A node answers nothing for a while: it may be gone, or may go on."""

    name: str


@dataclass(frozen=True)
class NodeDrained:
    """A node takes no new requests; those it has go on."""

    name: str


@dataclass(frozen=True)
class NodeSaid:
    """A message came from a node."""

    name: str
    message: Any


@dataclass(frozen=True)
class TimePassed:
    """Some time has gone by; leases may want extending, and waiting requests another try."""


Event = (
    RequestAdmitted
    | RequestCancelled
    | NodeJoined
    | NodeLost
    | NodeFellSilent
    | NodeDrained
    | NodeSaid
    | TimePassed
)


# commands


@dataclass(frozen=True)
class SayToNode:
    """Send a message of decode's or prefill's border to a node."""

    name: str
    message: Any


@dataclass(frozen=True)
class DeliverTokens:
    """Give a request's client its next tokens."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Phases:
    """Where a request's seconds went."""

    queued_s: float
    prefill_s: float
    transfer_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class FinishRequest:
    """Tell a request's client that it has everything."""

    request_id: str
    finish_reason: str
    cached_tokens_count: int
    phases: Phases


@dataclass(frozen=True)
class FailRequest:
    """Tell a request's client that it will get no more, and why."""

    request_id: str
    reason: str
    message: str


Command = SayToNode | DeliverTokens | FinishRequest | FailRequest
