"""Between the protobuf messages of trivium.v1 and plain values, both ways."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.proto import trivium_pb2
from cluster.validation import (
    MESSAGES_COUNT_MAX,
    STOP_STRINGS_COUNT_MAX,
    STOP_TOKEN_IDS_COUNT_MAX,
    ChatMessage,
    RequestedGeneration,
    RequestedSampling,
)

# Names here on the left, names on the wire on the right.
_WIRE_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "tokens_max": "max_tokens",
    "tokens_min": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logprobs_count": "logprobs",
}


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The chosen token at a position, and the likeliest ones, likeliest first."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """How many tokens a request had; cached ones are part of the prompt."""

    prompt_tokens_count: int
    cached_tokens_count: int
    output_tokens_count: int


@dataclass(frozen=True)
class Timing:
    """Where the seconds of a request went."""

    queued_s: float
    prefill_s: float
    transfer_s: float
    decode_s: float
    total_s: float


def to_requested(message: trivium_pb2.GenerateRequest) -> RequestedGeneration:
    """Read a request without judging it: what was not set becomes None.

    Of a list that is too long it takes one entry too many, which is all that the validator needs.
    """
    prompt = message.WhichOneof("prompt")
    turns = message.messages.messages[: MESSAGES_COUNT_MAX + 1]
    chat = tuple(ChatMessage(role=turn.role, content=turn.content) for turn in turns)
    return RequestedGeneration(
        text=message.text if prompt == "text" else None,
        token_ids=tuple(message.token_ids.ids) if prompt == "token_ids" else None,
        messages=chat if prompt == "messages" else None,
        sampling=_to_requested_sampling(message.sampling),
        priority=message.priority,
        client_request_id=message.client_request_id,
        add_special_tokens=message.add_special_tokens if message.HasField("add_special_tokens") else None,
    )


def _to_requested_sampling(message: trivium_pb2.SamplingParameters) -> RequestedSampling:
    numbers = {
        name: getattr(message, wire_name) if message.HasField(wire_name) else None
        for name, wire_name in _WIRE_NAMES.items()
    }
    return RequestedSampling(
        stop_strings=tuple(message.stop[: STOP_STRINGS_COUNT_MAX + 1]),
        stop_token_ids=tuple(message.stop_token_ids[: STOP_TOKEN_IDS_COUNT_MAX + 1]),
        ignore_eos=message.ignore_eos,
        **numbers,
    )


def from_requested(requested: RequestedGeneration) -> trivium_pb2.GenerateRequest:
    """Write a request for the wire; ValueError if a number does not fit its type there."""
    message = trivium_pb2.GenerateRequest(
        text=requested.text,
        sampling=_from_requested_sampling(requested.sampling),
        priority=requested.priority,
        client_request_id=requested.client_request_id,
        add_special_tokens=requested.add_special_tokens,
    )
    if requested.token_ids is not None:
        message.token_ids.CopyFrom(trivium_pb2.TokenIds(ids=requested.token_ids))
    if requested.messages is not None:
        turns = [trivium_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in requested.messages]
        message.messages.CopyFrom(trivium_pb2.ChatMessages(messages=turns))
    return message


def _from_requested_sampling(requested: RequestedSampling) -> trivium_pb2.SamplingParameters:
    numbers = {wire_name: getattr(requested, name) for name, wire_name in _WIRE_NAMES.items()}
    return trivium_pb2.SamplingParameters(
        stop=requested.stop_strings,
        stop_token_ids=requested.stop_token_ids,
        ignore_eos=requested.ignore_eos,
        **numbers,
    )


def admitted(request_id: str, prompt_tokens_count: int, seed: int) -> trivium_pb2.GenerateResponse:
    """Make the first event of a stream."""
    event = trivium_pb2.Admitted(request_id=request_id, prompt_tokens_count=prompt_tokens_count, seed=seed)
    return trivium_pb2.GenerateResponse(admitted=event)


def delta(
    text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()
) -> trivium_pb2.GenerateResponse:
    """Make an event of new text and new tokens; either may be empty."""
    event = trivium_pb2.Delta(text=text, token_ids=token_ids, logprobs=map(_from_logprob, logprobs))
    return trivium_pb2.GenerateResponse(delta=event)


def _from_logprob(entry: TokenLogprob) -> trivium_pb2.TokenLogprob:
    top = [
        trivium_pb2.TopLogprob(token_id=one.token_id, text=one.text, logprob=one.logprob) for one in entry.top
    ]
    return trivium_pb2.TokenLogprob(token_id=entry.token_id, text=entry.text, logprob=entry.logprob, top=top)


def to_logprob(message: trivium_pb2.TokenLogprob) -> TokenLogprob:
    """Read the logprobs of one position."""
    top = tuple(TopLogprob(token_id=one.token_id, text=one.text, logprob=one.logprob) for one in message.top)
    return TokenLogprob(token_id=message.token_id, text=message.text, logprob=message.logprob, top=top)


def finished_by_length(usage: Usage, timing: Timing) -> trivium_pb2.GenerateResponse:
    """Make the last event of a stream that reached max_tokens."""
    return _finished(trivium_pb2.FINISH_REASON_LENGTH, usage, timing)


def finished_by_token(token_id: int, usage: Usage, timing: Timing) -> trivium_pb2.GenerateResponse:
    """Make the last event of a stream that an end of sequence or a stop token ended."""
    return _finished(trivium_pb2.FINISH_REASON_STOP, usage, timing, matched_token_id=token_id)


def finished_by_string(stop_string: str, usage: Usage, timing: Timing) -> trivium_pb2.GenerateResponse:
    """Make the last event of a stream that a stop string ended."""
    return _finished(trivium_pb2.FINISH_REASON_STOP_STRING, usage, timing, matched_stop_string=stop_string)


def _finished(
    reason: trivium_pb2.FinishReason, usage: Usage, timing: Timing, **matched: str | int
) -> trivium_pb2.GenerateResponse:
    event = trivium_pb2.Finished(
        finish_reason=reason,
        usage=trivium_pb2.Usage(**vars(usage)),
        timing=trivium_pb2.Timing(**vars(timing)),
        **matched,
    )
    return trivium_pb2.GenerateResponse(finished=event)


def to_usage(message: trivium_pb2.Usage) -> Usage:
    """Read the counts of tokens of a finished request."""
    return Usage(message.prompt_tokens_count, message.cached_tokens_count, message.output_tokens_count)


def to_timing(message: trivium_pb2.Timing) -> Timing:
    """Read the seconds of a finished request."""
    return Timing(message.queued_s, message.prefill_s, message.transfer_s, message.decode_s, message.total_s)
