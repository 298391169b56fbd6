"""The one validator: every surface turns what it was sent into a RequestedGeneration and gets a ValidRequest.

It knows no wire format. Each refusal is an InvalidRequest with the field (by its name in trivium.proto),
the limit and the remedy. Cheap checks come first: a wrong number is found before a long text is tokenised.
"""

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cluster.errors import InvalidRequest
from decode.messages import SamplingParameters

Value = TypeVar("Value")

TEMPERATURE_MAX = 100.0
REPETITION_PENALTY_MIN = 0.01  # less makes logits that float32 cannot hold
REPETITION_PENALTY_MAX = 10.0
PENALTY_MAX = 2.0
SEED_MAX = 2**64 - 1
TOP_K_MAX = 2**31 - 1
STOP_STRINGS_COUNT_MAX = 16
STOP_STRING_CHARACTERS_MAX = 1024
STOP_TOKEN_IDS_COUNT_MAX = 64
LOGPROBS_COUNT_MAX = 20
PRIORITY_MAX = 100
CLIENT_REQUEST_ID_CHARACTERS_MAX = 128
MESSAGES_COUNT_MAX = 1024
ROLE_CHARACTERS_MAX = 64


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation; the chat template decides which roles there are."""

    role: str
    content: str


@dataclass(frozen=True)
class RequestedSampling:
    """Sampling as asked for, unchecked; None means that the client said nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    tokens_max: int | None = None
    tokens_min: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs_count: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class RequestedGeneration:
    """A request as it came, unchecked; exactly one of text, token_ids and messages should be set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    sampling: RequestedSampling = RequestedSampling()
    priority: int = 0
    client_request_id: str = ""
    add_special_tokens: bool | None = None


@dataclass(frozen=True)
class RequestLimits:
    """What the served model and the gateway's configuration allow."""

    vocab_size: int
    context_tokens_max: int
    tokens_max_default: int


@dataclass(frozen=True)
class ValidRequest:
    """A request that keeps every rule, as tokens; stop strings stay in the gateway, for nodes see no text."""

    token_ids: tuple[int, ...]
    sampling: SamplingParameters
    stop_strings: tuple[str, ...]
    priority: int
    client_request_id: str


class PromptTokenizer(Protocol):
    """What validation needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def render_chat(self, messages: tuple[ChatMessage, ...]) -> str: ...


def validate(
    request: RequestedGeneration,
    limits: RequestLimits,
    seed_if_absent: int,
    tokenizer: PromptTokenizer | None,
) -> ValidRequest:
    """Check a request and fill in what it leaves open; raises InvalidRequest at the first broken rule.

    Tokenising a long text takes milliseconds: an event loop should call this in a thread.
    """
    _check_label(request)
    _check_stops(request.sampling, limits, tokenizer)
    _check_numbers(request.sampling)
    token_ids = _prompt_tokens(request, tokenizer)
    _check_prompt_tokens(token_ids, limits)
    room = limits.context_tokens_max - len(token_ids)
    return ValidRequest(
        token_ids=token_ids,
        sampling=_sampling(request.sampling, limits, room, seed_if_absent),
        stop_strings=request.sampling.stop_strings,
        priority=request.priority,
        client_request_id=request.client_request_id,
    )


def _check_label(request: RequestedGeneration) -> None:
    if abs(request.priority) > PRIORITY_MAX:
        raise _out_of_range("priority", request.priority, f"-{PRIORITY_MAX} to {PRIORITY_MAX}")
    label = request.client_request_id
    if len(label) > CLIENT_REQUEST_ID_CHARACTERS_MAX or not label.isprintable():
        raise InvalidRequest(
            reason="INVALID_CLIENT_REQUEST_ID",
            message=f"a label of {len(label)} characters is too long or has unprintable ones",
            field="client_request_id",
            limit=f"{CLIENT_REQUEST_ID_CHARACTERS_MAX} printable characters",
            remedy="Send a short printable label, or none.",
        )


def _check_numbers(sampling: RequestedSampling) -> None:
    _check_real("temperature", sampling.temperature, 0.0, TEMPERATURE_MAX)
    _check_whole("top_k", sampling.top_k, 0, TOP_K_MAX)
    _check_real("top_p", sampling.top_p, 0.0, 1.0, open_below=True)
    _check_real("min_p", sampling.min_p, 0.0, 1.0)
    _check_whole("seed", sampling.seed, 0, SEED_MAX)
    _check_real(
        "repetition_penalty", sampling.repetition_penalty, REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX
    )
    _check_real("presence_penalty", sampling.presence_penalty, -PENALTY_MAX, PENALTY_MAX)
    _check_real("frequency_penalty", sampling.frequency_penalty, -PENALTY_MAX, PENALTY_MAX)
    _check_whole("logprobs", sampling.logprobs_count, 0, LOGPROBS_COUNT_MAX)


def _check_real(name: str, value: float | None, low: float, high: float, open_below: bool = False) -> None:
    """Refuse what lies outside [low, high], or (low, high]; written so that NaN fails too."""
    if value is None:
        return
    inside = math.isfinite(value) and low <= value <= high and not (open_below and value == low)
    if not inside:
        limits = f"above {low:g}, to {high:g}" if open_below else f"{low:g} to {high:g}"
        raise _out_of_range(f"sampling.{name}", value, limits)


def _check_whole(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise _out_of_range(f"sampling.{name}", value, f"{low} to {high}")


def _out_of_range(field: str, value: float, limit: str) -> InvalidRequest:
    return InvalidRequest(
        reason="OUT_OF_RANGE",
        message=f"{value} is out of range",
        field=field,
        limit=limit,
        remedy="Send a number in that range, or leave the field out.",
    )


def _check_stops(
    sampling: RequestedSampling, limits: RequestLimits, tokenizer: PromptTokenizer | None
) -> None:
    _check_count("sampling.stop", len(sampling.stop_strings), STOP_STRINGS_COUNT_MAX)
    _check_count("sampling.stop_token_ids", len(sampling.stop_token_ids), STOP_TOKEN_IDS_COUNT_MAX)
    _check_in_vocab("sampling.stop_token_ids", sampling.stop_token_ids, limits.vocab_size)
    if sampling.stop_strings and tokenizer is None:
        raise _no_tokenizer("sampling.stop", "Send stop_token_ids.")
    for stop in sampling.stop_strings:
        if not 1 <= len(stop) <= STOP_STRING_CHARACTERS_MAX:
            raise InvalidRequest(
                reason="INVALID_STOP_STRING",
                message=f"a stop string has {len(stop)} characters",
                field="sampling.stop",
                limit=f"1 to {STOP_STRING_CHARACTERS_MAX} characters",
                remedy="Leave out empty stop strings and shorten long ones.",
            )


def _check_count(field: str, count: int, count_max: int) -> None:
    if count > count_max:
        raise InvalidRequest(
            reason="TOO_MANY",
            message="there are too many entries",
            field=field,
            limit=f"{count_max} entries",
            remedy="Send fewer.",
        )


def _check_in_vocab(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                reason="TOKEN_ID_OUT_OF_RANGE",
                message=f"token id {token_id} at index {position} is not in the vocabulary",
                field=field,
                limit=f"0 to {vocab_size - 1}",
                remedy="Use the tokenizer of the served model.",
            )


def _prompt_tokens(request: RequestedGeneration, tokenizer: PromptTokenizer | None) -> tuple[int, ...]:
    given = [name for name in ("text", "token_ids", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            reason="INVALID_PROMPT",
            message=f"{len(given)} prompts were sent",
            field="prompt",
            limit="exactly one of text, token_ids and messages",
            remedy="Set one of them.",
        )
    if request.token_ids is not None:
        return request.token_ids
    if tokenizer is None:
        raise _no_tokenizer(given[0], "Send token_ids.")
    if request.text is not None:
        return _text_tokens(request.text, request.add_special_tokens is not False, tokenizer)
    return _chat_tokens(request.messages or (), request.add_special_tokens is True, tokenizer)


def _text_tokens(text: str, add_special_tokens: bool, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    if not text:
        raise _empty_prompt("text")
    _check_unicode("text", text)
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _chat_tokens(
    messages: tuple[ChatMessage, ...], add_special_tokens: bool, tokenizer: PromptTokenizer
) -> tuple[int, ...]:
    if not messages:
        raise _empty_prompt("messages")
    _check_count("messages", len(messages), MESSAGES_COUNT_MAX)
    for position, message in enumerate(messages):
        _check_unicode(f"messages[{position}].content", message.content)
        if not 1 <= len(message.role) <= ROLE_CHARACTERS_MAX or not message.role.isprintable():
            raise InvalidRequest(
                reason="INVALID_ROLE",
                message=f"a role of {len(message.role)} characters is empty, too long or unprintable",
                field=f"messages[{position}].role",
                limit=f"1 to {ROLE_CHARACTERS_MAX} printable characters",
                remedy="Use a role that the chat template knows, such as user or assistant.",
            )
    return tuple(tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=add_special_tokens))


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            reason="INVALID_UNICODE",
            message=f"character {error.start} is half of a surrogate pair",
            field=field,
            limit="text that UTF-8 can write",
            remedy="Send both halves as one character.",
        ) from error


def _check_prompt_tokens(token_ids: tuple[int, ...], limits: RequestLimits) -> None:
    if not token_ids:
        raise _empty_prompt("token_ids")
    prompt_tokens_max = limits.context_tokens_max - 1
    if len(token_ids) > prompt_tokens_max:
        raise InvalidRequest(
            reason="PROMPT_TOO_LONG",
            message=f"the prompt has {len(token_ids)} tokens",
            field="prompt",
            limit=f"{prompt_tokens_max} tokens, one less than the context of {limits.context_tokens_max}",
            remedy=f"Shorten the prompt by {len(token_ids) - prompt_tokens_max} tokens or more.",
        )
    _check_in_vocab("token_ids", token_ids, limits.vocab_size)


def _empty_prompt(field: str) -> InvalidRequest:
    return InvalidRequest(
        reason="EMPTY_PROMPT",
        message="the prompt is empty",
        field=field,
        limit="at least 1 token",
        remedy="Send some text, messages or token ids.",
    )


def _no_tokenizer(field: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(
        reason="NO_TOKENIZER",
        message="the served model has no tokenizer",
        field=field,
        limit="token ids only",
        remedy=remedy,
    )


def _sampling(
    asked: RequestedSampling, limits: RequestLimits, room: int, seed_if_absent: int
) -> SamplingParameters:
    tokens_max, tokens_min = _output_tokens(asked, limits, room)
    return SamplingParameters(
        temperature=_or_default(asked.temperature, 1.0),
        top_k=_or_default(asked.top_k, 0),
        top_p=_or_default(asked.top_p, 1.0),
        min_p=_or_default(asked.min_p, 0.0),
        seed=_or_default(asked.seed, seed_if_absent),
        tokens_max=tokens_max,
        tokens_min=tokens_min,
        stop_token_ids=asked.stop_token_ids,
        repetition_penalty=_or_default(asked.repetition_penalty, 1.0),
        presence_penalty=_or_default(asked.presence_penalty, 0.0),
        frequency_penalty=_or_default(asked.frequency_penalty, 0.0),
        logprobs_count=asked.logprobs_count,
        ignore_eos=asked.ignore_eos,
    )


def _or_default(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _output_tokens(asked: RequestedSampling, limits: RequestLimits, room: int) -> tuple[int, int]:
    """Choose (tokens_max, tokens_min); `room` is what the prompt leaves of the context, at least 1."""
    tokens_min = _or_default(asked.tokens_min, 0)
    tokens_max = _or_default(asked.tokens_max, min(max(limits.tokens_max_default, tokens_min), room))
    if not 1 <= tokens_max <= room:
        raise InvalidRequest(
            reason="OUT_OF_RANGE",
            message=f"{tokens_max} tokens of output do not fit",
            field="sampling.max_tokens",
            limit=f"1 to {room}: what the prompt leaves of a context of {limits.context_tokens_max}",
            remedy=f"Ask for at most {room} tokens, or shorten the prompt.",
        )
    if not 0 <= tokens_min <= tokens_max:
        raise _out_of_range("sampling.min_tokens", tokens_min, f"0 to {tokens_max}, which is max_tokens")
    return tokens_max, tokens_min
