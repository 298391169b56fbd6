"""What others say to a decode node, and what it says back.

gateway → node    ReservePages, AwaitPages, CancelRequest, ExtendLeases, AskReport
prefill → node    Latents (raw latents behind it), FirstToken
node → gateway    PageReservation, ReservationRefused, TokenChunks, RequestFailed, NodeReport
node → prefill    LatentsReceived
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from experts.messages import DispatchReport
from kernels.transport.schema import Schema
from kernels.transport.spans import UNTRACED

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class SamplingParameters:
    """How a request's tokens are chosen and when it ends; stop strings are the gateway's affair."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    tokens_max: int = 16
    tokens_min: int = 0
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs_count: int | None = None
    ignore_eos: bool = False

    @property
    def counts_outputs(self) -> bool:
        """Whether the choice of a token depends on how often each was chosen before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def ending_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Token ids that end this request."""
        return self.stop_token_ids if self.ignore_eos else (*self.stop_token_ids, *eos_token_ids)

    def finish_reason(self, token_id: int, outputs_count: int, eos_token_ids: tuple[int, ...]) -> str | None:
        """Why a request ends with `token_id` as its output number `outputs_count`, or None if it goes on."""
        if token_id in self.ending_ids(eos_token_ids):
            return STOP
        return LENGTH if outputs_count >= self.tokens_max else None

    def row(self, position: int, outputs_count: int, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
        """Fields of a sampling row for the token at `position` after `outputs_count` outputs."""
        return {
            "seed": self.seed,
            "position": position,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "banned_token_ids": self.ending_ids(eos_token_ids) if outputs_count < self.tokens_min else (),
            "logprobs_count": self.logprobs_count,
        }


@dataclass(frozen=True)
class ReservePages:
    """Keep room for a request: its prompt and all it may still produce.

    `token_ids` holds the first `prompt_tokens_count` of the client and what was generated before, on another
    node; `generation` counts the attempts at a request, so that what belongs to an earlier one is refused.
    """

    request_id: str
    generation: int
    token_ids: tuple[int, ...]
    prompt_tokens_count: int
    sampling: SamplingParameters
    traceparent: str = UNTRACED


@dataclass(frozen=True)
class AwaitPages:
    """A request waits until so many pages are free: let other gateways' requests not take them meanwhile.

    Holds for half a lease; the gateway's next one replaces it, and the request's CancelRequest ends it.
    """

    request_id: str
    pages_count: int


@dataclass(frozen=True)
class PageReservation:
    """Room is kept; latents go to `address`."""

    request_id: str
    generation: int
    address: str


@dataclass(frozen=True)
class ReservationRefused:
    """There is no room now; ask again when pages are free, or ask another node."""

    request_id: str
    generation: int
    pages_available_count: int


@dataclass(frozen=True)
class Latents:
    """Header of one layer's latents of tokens `begin..end`, which follow as raw bytes of `dtype`."""

    request_id: str
    generation: int
    layer: int
    begin: int
    end: int
    dtype: str
    checksum: int | None
    """Of their bytes; None where they go from GPU to GPU, over links that check by themselves."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token, and of the likeliest ones as (token id, logprob)."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FirstToken:
    """The prefill node's last word on a request: all latents are sent, and this token came out."""

    request_id: str
    generation: int
    token_id: int


@dataclass(frozen=True)
class LatentsReceived:
    """All latents of a request are in their pages."""

    request_id: str
    generation: int


@dataclass(frozen=True)
class CancelRequest:
    """Forget a request, wherever it stands; generations up to this one."""

    request_id: str
    generation: int


@dataclass(frozen=True)
class ExtendLeases:
    """These requests are still wanted."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class AskReport:
    """Answer with a NodeReport."""


@dataclass(frozen=True)
class TokenChunk:
    """The next tokens of one request; `index` is the place of the first among its outputs."""

    request_id: str
    generation: int
    index: int
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TokenChunks:
    """All that one step has for one gateway."""

    chunks: tuple[TokenChunk, ...]


@dataclass(frozen=True)
class RequestFailed:
    """A node cannot go on with a request; another attempt may succeed if `retryable`."""

    request_id: str
    generation: int
    reason: str
    message: str
    retryable: bool


@dataclass(frozen=True)
class NodeReport:
    """Numbers that a prefill or decode node returns about itself."""

    name: str
    kind: str
    address: str
    requests_running_count: int
    requests_waiting_count: int
    tokens_waiting_count: int
    pages_total_count: int
    pages_free_count: int
    pages_cached_count: int
    pages_leased_count: int
    tokens_count: int
    steps_count: int
    experts_epoch: int
    refused_frames_count: int
    failures: dict[str, int] = field(default_factory=dict)
    transfer_s: float = 0.0
    """Seconds that latents were still on their way after their prompt was computed, all requests together."""
    busy_s: float = 0.0
    """Seconds spent in steps."""
    pages_arriving_count: int = 0
    """Of the leased pages, those of requests whose latents are still to come."""

    @property
    def requests_count(self) -> int:
        """Requests that the node has, running or waiting."""
        return self.requests_running_count + self.requests_waiting_count

    cached_tokens_count: int = 0
    """Prompt tokens that a prefill node found in its pages, beside `tokens_count` that it computed."""
    latents_bytes: int = 0
    """Bytes of latents that a prefill node has sent, or a decode node received."""
    receiving_s: float = 0.0
    """Seconds in which frames of latents came in to a decode node, all prefill nodes' together."""
    dispatch: DispatchReport = field(default_factory=DispatchReport)


def checksum(parts: Sequence[memoryview]) -> int:
    """CRC-32 of parts, one after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


DOWN = Schema(ReservePages, AwaitPages, CancelRequest, ExtendLeases, AskReport, Latents, FirstToken)
UP = Schema(PageReservation, ReservationRefused, TokenChunks, RequestFailed, NodeReport, LatentsReceived)
