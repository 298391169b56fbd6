"""What decode is told and says: rules of sampling, and messages that survive the wire or are refused."""

import dataclasses

import msgpack
import pytest

from decode.messages import (
    DOWN,
    LENGTH,
    STOP,
    UP,
    AskReport,
    AwaitPages,
    CancelRequest,
    ExtendLeases,
    FirstToken,
    Latents,
    LatentsReceived,
    NodeReport,
    PageReservation,
    RequestFailed,
    ReservationRefused,
    ReservePages,
    SamplingParameters,
    TokenChunk,
    TokenChunks,
    TokenLogprob,
    checksum,
)
from kernels.ops.sample import SampleRow
from kernels.transport.errors import FrameMalformed

EOS = (1, 2)


@pytest.mark.parametrize(
    ("sampling", "token_id", "outputs_count", "reason"),
    [
        (SamplingParameters(tokens_max=4), 9, 3, None),
        (SamplingParameters(tokens_max=4), 9, 4, LENGTH),
        (SamplingParameters(tokens_max=4), 9, 5, LENGTH),
        (SamplingParameters(tokens_max=4), 2, 1, STOP),
        (SamplingParameters(tokens_max=4), 2, 4, STOP),
        (SamplingParameters(tokens_max=4, ignore_eos=True), 2, 1, None),
        (SamplingParameters(tokens_max=4, ignore_eos=True), 2, 4, LENGTH),
        (SamplingParameters(tokens_max=4, stop_token_ids=(9,)), 9, 1, STOP),
        (SamplingParameters(tokens_max=4, stop_token_ids=(9,), ignore_eos=True), 9, 1, STOP),
        (SamplingParameters(tokens_max=4, stop_token_ids=(9,)), 1, 1, STOP),
        (SamplingParameters(tokens_max=1), 9, 1, LENGTH),
    ],
)
def test_finish_reason(sampling, token_id, outputs_count, reason):
    assert sampling.finish_reason(token_id, outputs_count, EOS) == reason


def test_a_row_names_every_field_of_sampling_that_a_choice_depends_on():
    sampling = SamplingParameters(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        seed=12,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logprobs_count=3,
    )
    row = SampleRow(**sampling.row(17, 2, EOS))
    for field in set(SampleRow.__dataclass_fields__) & set(SamplingParameters.__dataclass_fields__):
        assert getattr(row, field) == getattr(sampling, field), field
    assert (row.position, row.banned_token_ids) == (17, ())


@pytest.mark.parametrize(
    ("fields", "outputs_count", "banned"),
    [
        ({"tokens_min": 3}, 2, (7, 1, 2)),
        ({"tokens_min": 3}, 3, ()),
        ({"tokens_min": 3, "ignore_eos": True}, 0, (7,)),
        ({}, 0, ()),
    ],
)
def test_what_would_end_a_request_is_banned_below_its_minimum(fields, outputs_count, banned):
    sampling = SamplingParameters(stop_token_ids=(7,), **fields)
    assert sampling.row(0, outputs_count, EOS)["banned_token_ids"] == banned


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_outputs_are_counted_only_for_those_who_pay_for_them(field):
    assert not SamplingParameters().counts_outputs
    assert SamplingParameters(**{field: 1.5}).counts_outputs


SAMPLING = SamplingParameters(0.5, 3, 0.9, 0.1, 2**64 - 1, 8, 1, (4, 5), 1.1, 0.2, 0.3, 2, True)
TO_NODE = [
    ReservePages("r", 3, (5, 6, 7), 2, SAMPLING),
    ReservePages("r", 3, (5,), 1, SamplingParameters()),
    AwaitPages("r", 40),
    CancelRequest("r", 2),
    ExtendLeases(("a", "b")),
    ExtendLeases(()),
    AskReport(),
    Latents("r", 1, 60, 64, 128, "bfloat16", 2**32 - 1),
    FirstToken("r", 1, 511),
]
FROM_NODE = [
    PageReservation("r", 1, "unix:///tmp/decode.sock"),
    ReservationRefused("r", 1, 3),
    TokenChunks((TokenChunk("r", 1, 4, (7,), STOP, (TokenLogprob(-0.5, ((7, -0.5), (8, -1.5))),)),)),
    TokenChunks((TokenChunk("r", 1, 4, (7, 8)), TokenChunk("s", 2, 0, (9,), LENGTH))),
    RequestFailed("r", 1, "experts_unavailable", "no answer", True),
    NodeReport("d", "decode", "tcp://h:1", 1, 2, 3, 10, 4, 5, 1, 99, 9, 7, 0, {"internal": 1}, 0.5, 1.5),
    LatentsReceived("r", 1),
]


def word(value: object) -> str:
    """What a test is called by, the same in every process: its seed is made of it."""
    return {id(DOWN): "down", id(UP): "up"}.get(id(value)) or str(value)


@pytest.mark.parametrize(
    ("schema", "message"), [(DOWN, m) for m in TO_NODE] + [(UP, m) for m in FROM_NODE], ids=word
)
def test_every_message_survives_the_wire(schema, message):
    sent = []
    channel = type("Channel", (), {"send": lambda _, kind, body, parts: sent.append((kind, body))})()
    schema.send(channel, message)
    kind, body = sent[0]
    assert schema.read(kind, msgpack.unpackb(msgpack.packb(body))) == message


def as_body(message) -> dict:
    return msgpack.unpackb(msgpack.packb(dataclasses.asdict(message)))


MALFORMED = [
    (DOWN, "NoSuchThing", {}),
    (DOWN, "TokenChunks", as_body(FROM_NODE[2])),
    (UP, "ReservePages", as_body(TO_NODE[0])),
    (DOWN, "CancelRequest", None),
    (DOWN, "CancelRequest", []),
    (DOWN, "CancelRequest", {"request_id": "r"}),
    (DOWN, "CancelRequest", {"request_id": "r", "generation": "later"}),
    (DOWN, "CancelRequest", {"request_id": 7, "generation": 1}),
    (DOWN, "CancelRequest", {"request_id": b"\xff\xfe", "generation": 1}),
    (DOWN, "ReservePages", as_body(TO_NODE[0]) | {"token_ids": "567"}),
    (DOWN, "ReservePages", as_body(TO_NODE[0]) | {"token_ids": [1, None]}),
    (DOWN, "ReservePages", as_body(TO_NODE[0]) | {"sampling": {"temperature": "hot"}}),
    (DOWN, "ReservePages", as_body(TO_NODE[0]) | {"sampling": 1}),
    (DOWN, "Latents", as_body(TO_NODE[6]) | {"layer": 0.5}),
    (DOWN, "Latents", as_body(TO_NODE[6]) | {"dtype": None}),
    (UP, "TokenChunks", {"chunks": [{"request_id": "r"}]}),
]


@pytest.mark.parametrize(("schema", "kind", "body"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_message_is_refused(schema, kind, body):
    with pytest.raises(FrameMalformed):
        schema.read(kind, body)


def test_a_refusal_names_the_field():
    body = as_body(TO_NODE[0])
    body["sampling"]["top_k"] = "many"
    with pytest.raises(FrameMalformed, match=r"'sampling\.top_k' of ReservePages"):
        DOWN.read("ReservePages", body)


def test_a_checksum_is_that_of_the_bytes_however_they_are_cut():
    data = bytes(range(256)) * 5
    view = memoryview(data)
    assert checksum([view]) == checksum([view[:7], view[7:7], view[7:900], view[900:]])
    assert checksum([view]) != checksum([view[:-1]])
    assert checksum([view[:2], view[2:4]]) != checksum([view[2:4], view[:2]])
