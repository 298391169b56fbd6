"""Prefix and header: what is let through, and how each kind of damage is named."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.transport.errors import FrameError, FrameMalformed, FrameTooLarge
from kernels.transport.frame import (
    KIND_CHARACTERS_MAX,
    MAGIC,
    PARTS_COUNT_MAX,
    PREFIX,
    FrameLimits,
    Header,
    decode_header,
    decode_prefix,
    encode,
)

LIMITS = FrameLimits(header_bytes_max=1000, payload_bytes_max=5000)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def packed(kind="k", body=None, sizes=()) -> bytes:
    return msgpack.packb([kind, body, list(sizes)])


@given(kind=st.text(max_size=KIND_CHARACTERS_MAX), body=plain, sizes=st.lists(st.integers(0, 99), max_size=9))
def test_what_is_encoded_is_decoded(kind, body, sizes):
    data = encode(kind, body, [memoryview(bytes(size)) for size in sizes])
    header_bytes, payload_bytes = decode_prefix(data[: PREFIX.size], FrameLimits())
    assert header_bytes == len(data) - PREFIX.size
    assert payload_bytes == sum(sizes)
    assert decode_header(data[PREFIX.size :], payload_bytes) == Header(kind, body, tuple(sizes))


@given(data=st.binary(min_size=PREFIX.size, max_size=PREFIX.size) | st.binary(max_size=40))
def test_no_prefix_does_harm(data):
    try:
        header_bytes, payload_bytes = decode_prefix(data, LIMITS)
    except FrameError:
        return
    assert data.startswith(MAGIC)
    assert header_bytes <= LIMITS.header_bytes_max
    assert payload_bytes <= LIMITS.payload_bytes_max


@given(header_bytes=st.integers(1, 2**32 - 1), payload_bytes=st.integers(0, 2**64 - 1))
def test_sizes_are_let_through_up_to_the_limits(header_bytes, payload_bytes):
    data = PREFIX.pack(MAGIC, header_bytes, payload_bytes)
    if header_bytes <= LIMITS.header_bytes_max and payload_bytes <= LIMITS.payload_bytes_max:
        assert decode_prefix(data, LIMITS) == (header_bytes, payload_bytes)
    else:
        with pytest.raises(FrameTooLarge, match="limit is"):
            decode_prefix(data, LIMITS)


@pytest.mark.parametrize(("header_bytes", "payload_bytes"), [(1000, 5000), (1, 0)])
def test_the_limits_themselves_are_allowed(header_bytes, payload_bytes):
    assert decode_prefix(PREFIX.pack(MAGIC, header_bytes, payload_bytes), LIMITS) == (
        header_bytes,
        payload_bytes,
    )


@pytest.mark.parametrize(
    "data", [PREFIX.pack(b"TRV2", 1, 0), PREFIX.pack(MAGIC, 0, 0), MAGIC, b"", bytes(17)]
)
def test_a_malformed_prefix_is_named_so(data):
    with pytest.raises(FrameMalformed):
        decode_prefix(data, LIMITS)


@given(data=st.binary(max_size=200), payload_bytes=st.integers(0, 300))
def test_no_header_does_harm(data, payload_bytes):
    try:
        header = decode_header(data, payload_bytes)
    except FrameError:
        return
    assert header.payload_bytes == payload_bytes


@given(data=plain.map(msgpack.packb))
def test_msgpack_of_another_shape_is_malformed_or_a_header(data):
    try:
        header = decode_header(data, 0)
    except FrameError:
        return
    assert isinstance(header.kind, str)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
        packed() + b"more",
        packed()[:-1],
        msgpack.packb(7),
        msgpack.packb(["kind", None]),
        msgpack.packb(["kind", None, [], None]),
        packed(kind=b"bytes"),
        packed(kind=7),
        packed(kind="k" * (KIND_CHARACTERS_MAX + 1)),
        msgpack.packb(["kind", None, 0]),
        msgpack.packb(["kind", None, {}]),
        packed(sizes=[-1, 1]),
        packed(sizes=[False]),
        packed(sizes=[0.0]),
        packed(sizes=["0"]),
        packed(sizes=[None]),
        packed(sizes=[1]),
        b"\x93\xa1k\x81\x90\xc0\x90",  # a list as a key
        b"\x93\xa2\xff\xfe\xc0\x90",  # no UTF-8
        b"\x93\xa1k" + b"\x91" * 5000,
        b"\x93\xa1k\xdf\xff\xff\xff\xff",  # a map of four billion
        b"\x93\xa1k\xc6\xff\xff\xff\xff",  # bytes of four billion
    ],
)
def test_a_malformed_header_is_named_so(data):
    with pytest.raises(FrameMalformed):
        decode_header(data, 0)


@pytest.mark.parametrize("payload_bytes", [0, 9, 11])
def test_parts_must_add_up_to_the_payload(payload_bytes):
    with pytest.raises(FrameMalformed, match="add up"):
        decode_header(packed(sizes=[4, 6]), payload_bytes)


def test_too_many_parts_are_too_large():
    assert len(decode_header(packed(sizes=[0] * PARTS_COUNT_MAX), 0).part_sizes) == PARTS_COUNT_MAX
    with pytest.raises(FrameTooLarge, match="parts"):
        decode_header(packed(sizes=[0] * (PARTS_COUNT_MAX + 1)), 0)
