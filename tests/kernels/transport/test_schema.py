"""Messages as dataclasses: what was sent comes back, and what does not fit is named by its field."""

import contextlib
import socket
from dataclasses import dataclass

import pytest

from kernels.transport.errors import FrameMalformed
from kernels.transport.frame import Frame
from kernels.transport.schema import PLACE_CHARACTERS_MAX, Schema
from kernels.transport.stream import StreamChannel


@dataclass(frozen=True)
class Piece:
    token_ids: tuple[int, ...]
    score: float | None = None


@dataclass(frozen=True)
class Parcel:
    request_id: str
    pieces: tuple[Piece, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Foreign:
    request_id: str


BORDER = Schema(Piece, Parcel)
PARCEL = Parcel("r1", (Piece((1, 2), 0.5), Piece(())), {"a": 1})


def test_a_message_and_its_bytes_cross():
    here, there = map(StreamChannel, socket.socketpair())
    with contextlib.closing(here), contextlib.closing(there):
        BORDER.send(here, PARCEL, [memoryview(b"abc")])
        frame = there.receive_ready()
    assert frame.kind == "Parcel"
    assert BORDER.read_frame(frame) == PARCEL
    assert [bytes(part) for part in frame.parts] == [b"abc"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"pieces": [], "labels": {}}, "request_id"),
        ({"request_id": 7, "pieces": [], "labels": {}}, "request_id"),
        ({"request_id": "r", "pieces": [{"token_ids": [1, "x"]}], "labels": {}}, "pieces.0.token_ids.1"),
        ({"request_id": "r", "pieces": [{"token_ids": None}], "labels": {}}, "pieces.0.token_ids"),
        ({"request_id": "r", "pieces": [], "labels": {"a": "many"}}, "labels.a"),
    ],
)
def test_the_field_that_does_not_fit_is_named(body, place):
    with pytest.raises(FrameMalformed, match=f"field '{place}' of Parcel"):
        BORDER.read("Parcel", body)


@pytest.mark.parametrize("body", [None, 7, "text", [], [1, 2], {}, {1: 2}, b"bytes"])
def test_a_body_of_another_shape_is_malformed(body):
    with pytest.raises(FrameMalformed):
        BORDER.read_frame(Frame("Parcel", body, []))


@pytest.mark.parametrize("kind", ["Foreign", "", "parcel", "x" * 10_000])
def test_an_unknown_kind_is_malformed_and_quoted_shortly(kind):
    with pytest.raises(FrameMalformed, match="not a message of this border") as caught:
        BORDER.read(kind, {})
    assert len(str(caught.value)) < 100


def test_a_key_of_the_peers_is_quoted_shortly():
    body = {"request_id": "r", "pieces": [], "labels": {"k" * 10_000: "many"}}
    with pytest.raises(FrameMalformed) as caught:
        BORDER.read("Parcel", body)
    assert len(str(caught.value)) < PLACE_CHARACTERS_MAX + 100


def test_a_foreign_message_is_not_sent():
    with pytest.raises(TypeError, match="Foreign"):
        BORDER.send(None, Foreign("r"))
