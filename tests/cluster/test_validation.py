"""Each rule of a request, from both sides of its limit."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.gateway_messages import from_requested, to_requested
from cluster.proto import trivium_pb2
from cluster.validation import (
    STOP_STRINGS_COUNT_MAX,
    STOP_TOKEN_IDS_COUNT_MAX,
    ChatMessage,
    RequestedGeneration,
    RequestedSampling,
    RequestLimits,
    ValidRequest,
    validate,
)
from decode.messages import SamplingParameters

LIMITS = RequestLimits(vocab_size=100, context_tokens_max=32, tokens_max_default=8)


class LetterTokenizer:
    """One token a letter, and 99 in front."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [99] * add_special_tokens + [ord(letter) % 99 for letter in text]

    def render_chat(self, messages: tuple[ChatMessage, ...]) -> str:
        return "".join(f"{message.role}:{message.content}" for message in messages)


def check(tokenizer: Any = None, limits: RequestLimits = LIMITS, **fields: Any) -> ValidRequest:
    sampling = RequestedSampling(**fields.pop("sampling", {}))
    if not {"text", "messages", "token_ids"} & set(fields):
        fields["token_ids"] = (1, 2, 3)
    request = RequestedGeneration(sampling=sampling, **fields)
    return validate(request, limits, seed_if_absent=7, tokenizer=tokenizer)


def refused(tokenizer: Any = None, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(tokenizer, **fields)
    error = caught.value
    assert error.field and error.limit and error.remedy and error.reason.isupper()
    return error


def test_a_bare_request_takes_the_defaults():
    valid = check()
    assert valid == ValidRequest((1, 2, 3), SamplingParameters(seed=7, tokens_max=8), (), 0, "")


def test_all_that_is_asked_for_arrives():
    asked = {
        "temperature": 0.0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": 2**64 - 1,
        "tokens_max": 9,
        "tokens_min": 2,
        "stop_token_ids": (4, 5),
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "logprobs_count": 0,
        "ignore_eos": True,
    }
    valid = check(
        LetterTokenizer(), sampling=asked | {"stop_strings": ("a",)}, priority=-3, client_request_id="mine"
    )
    assert dataclasses.asdict(valid.sampling) == asked
    assert (valid.stop_strings, valid.priority, valid.client_request_id) == (("a",), -3, "mine")


@pytest.mark.parametrize(
    ("name", "wire_name", "good", "bad"),
    [
        ("temperature", "temperature", [0.0, 100.0], [-0.1, 100.1]),
        ("top_k", "top_k", [0, 1, 2**31 - 1], [-1]),
        ("top_p", "top_p", [1e-9, 1.0], [0.0, -0.5, 1.01]),
        ("min_p", "min_p", [0.0, 1.0], [-0.01, 1.01]),
        ("seed", "seed", [0, 2**64 - 1], [-1, 2**64]),
        ("tokens_max", "max_tokens", [1, 29], [0, -1, 30]),
        ("tokens_min", "min_tokens", [0, 8], [-1, 30]),
        ("repetition_penalty", "repetition_penalty", [0.01, 10.0], [1e-39, 0.0099, 0.0, -1.0, 10.1]),
        ("presence_penalty", "presence_penalty", [-2.0, 2.0], [-2.1, 2.1]),
        ("frequency_penalty", "frequency_penalty", [-2.0, 2.0], [-2.1, 2.1]),
        ("logprobs_count", "logprobs", [0, 20], [-1, 21]),
    ],
)
def test_numbers_are_held_to_their_range(name, wire_name, good, bad):
    for value in good:
        assert getattr(check(sampling={name: value}).sampling, name) == value
    if isinstance(good[0], float):
        bad = [*bad, math.nan, math.inf, -math.inf]
    for value in bad:
        assert wire_name in refused(sampling={name: value}).field


def test_prompts_that_are_empty_or_not_one():
    assert refused(token_ids=()).reason == "EMPTY_PROMPT"
    assert refused(LetterTokenizer(), text="").reason == "EMPTY_PROMPT"
    assert refused(LetterTokenizer(), messages=()).reason == "EMPTY_PROMPT"
    assert refused(text=None).reason == "INVALID_PROMPT"
    assert refused(LetterTokenizer(), text="a", token_ids=(1,)).reason == "INVALID_PROMPT"


def test_a_prompt_may_fill_the_context_but_for_one_token():
    assert check(token_ids=(1,) * 31).sampling.tokens_max == 1
    error = refused(token_ids=(1,) * 40)
    assert error.reason == "PROMPT_TOO_LONG"
    assert "32" in error.limit and "by 9 tokens" in error.remedy


@pytest.mark.parametrize("token_id", [-1, 100, 2**32 - 1])
def test_token_ids_out_of_the_vocabulary(token_id):
    error = refused(token_ids=(1, token_id))
    assert (error.field, error.limit) == ("token_ids", "0 to 99")
    assert str(token_id) in error.message and "index 1" in error.message
    assert refused(sampling={"stop_token_ids": (token_id,)}).field == "sampling.stop_token_ids"


def test_tokens_max_takes_the_room_that_is_left():
    assert check(token_ids=(1,) * 28).sampling.tokens_max == 4
    assert check(sampling={"tokens_min": 20}).sampling.tokens_max == 20
    assert refused(token_ids=(1,) * 28, sampling={"tokens_max": 5}).limit.startswith("1 to 4")
    assert refused(sampling={"tokens_max": 3, "tokens_min": 4}).field == "sampling.min_tokens"


def test_stops_are_few_and_short():
    words = LetterTokenizer()
    assert check(words, sampling={"stop_strings": ("x" * 1024,) * 16}).stop_strings[15] == "x" * 1024
    for stops in [("",), ("x" * 1025,), ("x",) * 17]:
        assert refused(words, sampling={"stop_strings": stops}).field == "sampling.stop"
    assert len(check(sampling={"stop_token_ids": (1,) * 64}).sampling.stop_token_ids) == 64
    assert refused(sampling={"stop_token_ids": (1,) * 65}).limit == "64 entries"


def test_labels_and_priorities():
    assert check(client_request_id="é" * 128).client_request_id == "é" * 128
    for label in ["x" * 129, "a\nb", "\x1b[31m"]:
        assert refused(client_request_id=label).field == "client_request_id"
    assert check(priority=-100).priority == -100
    assert refused(priority=101).field == refused(priority=-101).field == "priority"


def test_text_and_messages_need_a_tokenizer():
    words = LetterTokenizer()
    assert check(words, text="a").token_ids == (99, ord("a") % 99)
    assert check(words, text="a", add_special_tokens=False).token_ids == (ord("a") % 99,)
    assert 99 not in check(words, messages=(ChatMessage("user", "hi"),)).token_ids
    for fields in [
        {"text": "a"},
        {"messages": (ChatMessage("user", "a"),)},
        {"sampling": {"stop_strings": ("a",)}},
    ]:
        assert refused(None, **fields).reason == "NO_TOKENIZER"


def test_text_that_is_no_text():
    assert refused(LetterTokenizer(), text="\ud800").reason == "INVALID_UNICODE"
    assert refused(LetterTokenizer(), messages=(ChatMessage("", "a"),)).field == "messages[0].role"
    assert (
        refused(LetterTokenizer(), messages=(ChatMessage("user", "\udfff"),)).field == "messages[0].content"
    )


def test_the_wire_tells_absent_from_zero():
    assert to_requested(trivium_pb2.GenerateRequest()) == RequestedGeneration()
    sampling = trivium_pb2.SamplingParameters(temperature=0, logprobs=0, seed=0)
    requested = to_requested(trivium_pb2.GenerateRequest(text="", sampling=sampling)).sampling
    assert (requested.temperature, requested.logprobs_count, requested.seed) == (0, 0, 0)
    assert requested.top_k is None


def test_unknown_fields_on_the_wire_are_ignored():
    known = trivium_pb2.GenerateRequest(text="a").SerializeToString()
    unknown = bytes([0xFA, 0x3F, 3]) + b"new"  # Field 1023, a text.
    assert to_requested(trivium_pb2.GenerateRequest.FromString(known + unknown)) == RequestedGeneration(
        text="a"
    )


@pytest.mark.parametrize("field", ["messages", "sampling.stop", "sampling.stop_token_ids"])
def test_of_a_list_that_is_too_long_the_wire_hands_on_no_more_than_refuses_it(field):
    sampling = trivium_pb2.SamplingParameters()
    message = trivium_pb2.GenerateRequest(text="a")
    if field == "messages":
        turns = [trivium_pb2.ChatMessage(role="user")] * 100_000
        message = trivium_pb2.GenerateRequest(messages=trivium_pb2.ChatMessages(messages=turns))
    elif field == "sampling.stop":
        sampling.stop.extend(["x"] * 100_000)
    else:
        sampling.stop_token_ids.extend([1] * 100_000)
    message.sampling.CopyFrom(sampling)
    requested = to_requested(message)
    lists = (requested.messages or (), requested.sampling.stop_strings, requested.sampling.stop_token_ids)
    assert sum(map(len, lists)) < 1100
    with pytest.raises(InvalidRequest) as caught:
        validate(requested, LIMITS, 7, LetterTokenizer())
    assert (caught.value.reason, caught.value.field) == ("TOO_MANY", field)


PROMPTS = st.one_of(
    st.builds(dict, text=st.text()),
    st.builds(dict, token_ids=st.lists(st.integers(0, 2**32 - 1)).map(tuple)),
    st.builds(dict, messages=st.lists(st.builds(ChatMessage, st.text(), st.text())).map(tuple)),
)
SAMPLING = st.builds(
    RequestedSampling,
    temperature=st.none() | st.floats(allow_nan=False),
    top_k=st.none() | st.integers(-(2**31), 2**31 - 1),
    top_p=st.none() | st.floats(allow_nan=False),
    seed=st.none() | st.integers(0, 2**64 - 1),
    tokens_max=st.none() | st.integers(-(2**31), 2**31 - 1),
    stop_strings=st.lists(st.text(), max_size=STOP_STRINGS_COUNT_MAX + 1).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=STOP_TOKEN_IDS_COUNT_MAX + 1).map(tuple),
    logprobs_count=st.none() | st.integers(-5, 50),
    ignore_eos=st.booleans(),
)


@given(PROMPTS, SAMPLING, st.integers(-(2**31), 2**31 - 1), st.text(), st.none() | st.booleans())
def test_the_wire_carries_any_request_unchanged(prompt, sampling, priority, label, add_special_tokens):
    requested = RequestedGeneration(
        sampling=sampling,
        priority=priority,
        client_request_id=label,
        add_special_tokens=add_special_tokens,
        **prompt,
    )
    payload = from_requested(requested).SerializeToString()
    assert to_requested(trivium_pb2.GenerateRequest.FromString(payload)) == requested


@given(PROMPTS, SAMPLING, st.integers(-200, 200), st.text())
def test_any_request_is_valid_or_refused(prompt, sampling, priority, label):
    requested = RequestedGeneration(sampling=sampling, priority=priority, client_request_id=label, **prompt)
    try:
        valid = validate(requested, LIMITS, seed_if_absent=7, tokenizer=LetterTokenizer())
    except InvalidRequest as error:
        assert error.field and error.limit and error.remedy
        return
    assert len(valid.token_ids) + valid.sampling.tokens_max <= LIMITS.context_tokens_max
    assert all(0 <= token_id < LIMITS.vocab_size for token_id in valid.token_ids)
