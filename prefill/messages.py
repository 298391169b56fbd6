"""What others say to a prefill node, and what it says back.

gateway → node    PrefillPrompt, CancelRequest, AskReport
decode → node     LatentsReceived
node → gateway    FirstTokenChunk, HandedOver, RequestFailed, NodeReport
node → decode     Latents, FirstToken (words of decode, which receives them)
"""

from dataclasses import dataclass

from decode.messages import (
    AskReport,
    CancelRequest,
    NodeReport,
    RequestFailed,
    SamplingParameters,
    TokenChunk,
)
from kernels.transport.schema import Schema
from kernels.transport.spans import UNTRACED

PRIORITY_S = 10.0  # seconds of waiting that one step of priority is worth, so that nobody waits for ever


@dataclass(frozen=True)
class PrefillPrompt:
    """Compute the latents of `token_ids` and a first token, for the reservation at `decode_address`."""

    request_id: str
    generation: int
    token_ids: tuple[int, ...]
    prompt_tokens_count: int
    sampling: SamplingParameters
    decode_address: str
    priority: int = 0
    traceparent: str = UNTRACED


@dataclass(frozen=True)
class FirstTokenChunk:
    """The first token, and how the prompt went; times in seconds on the node's clock."""

    chunk: TokenChunk
    cached_tokens_count: int
    prefill_s: float


@dataclass(frozen=True)
class HandedOver:
    """The decode node has all latents; `transfer_s` passed since the prompt was computed."""

    request_id: str
    generation: int
    transfer_s: float


DOWN = Schema(PrefillPrompt, CancelRequest, AskReport)
UP = Schema(FirstTokenChunk, HandedOver, RequestFailed, NodeReport)
