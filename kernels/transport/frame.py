"""One message on a channel: a prefix, a msgpack header, then raw bytes.

    | "TRV1" | header bytes u32 | payload bytes u64 |  msgpack [kind, body, part sizes]  |  parts ...  |

Every size is checked against a limit before a byte is allocated for it.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from kernels.transport.errors import FrameMalformed, FrameTooLarge

MAGIC = b"TRV1"
HELLO = "hello"
"""Kind of the first frame of who connects."""
PREFIX = struct.Struct("<4sIQ")
KIND_CHARACTERS_MAX = 64
PARTS_COUNT_MAX = 4096

Body = Any
Part = Any
"""A view of bytes; on a device channel also a contiguous tensor in the memory of its GPU."""
Buffers = Sequence[Part]


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a receiver lets a peer announce."""

    header_bytes_max: int = 8 << 20
    payload_bytes_max: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of itself before its payload is read; `body` is plain msgpack data."""

    kind: str
    body: Body
    part_sizes: tuple[int, ...]
    on_device: tuple[bool, ...] = ()
    """Which parts come from the memory of a GPU; empty where none does."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.part_sizes)


@dataclass(slots=True)
class Frame:
    """One received message; `parts` are the views that its receiver chose, and none where it refused."""

    kind: str
    body: Body
    parts: list[Part]
    refused: bool = False


ChooseBuffers = Callable[[Header], Buffers | None]
"""Names the memory that a payload goes to, adding up to its size; None has it dropped.

Parts on a device go to tensors on the device, the others to views, each kind in its order.
"""


def encode(kind: str, body: Body, parts: Sequence[memoryview]) -> bytes:
    """Prefix and header of a frame whose `parts`, flat views of bytes, are to follow."""
    sizes = [part.nbytes for part in parts]
    header = msgpack.packb([kind, body, sizes])
    return PREFIX.pack(MAGIC, len(header), sum(sizes)) + header


def decode_prefix(data: bytes | bytearray | memoryview, limits: FrameLimits) -> tuple[int, int]:
    """Header and payload size in bytes; raises FrameMalformed or FrameTooLarge."""
    if len(data) != PREFIX.size:
        raise FrameMalformed(f"a prefix of {len(data)} bytes, it has {PREFIX.size}")
    magic, header_bytes, payload_bytes = PREFIX.unpack(data)
    if magic != MAGIC:
        raise FrameMalformed("the first bytes are not those of a frame")
    if header_bytes == 0:
        raise FrameMalformed("a frame has no header")
    if header_bytes > limits.header_bytes_max:
        raise FrameTooLarge(f"header of {header_bytes} bytes, the limit is {limits.header_bytes_max}")
    if payload_bytes > limits.payload_bytes_max:
        raise FrameTooLarge(f"payload of {payload_bytes} bytes, the limit is {limits.payload_bytes_max}")
    return header_bytes, payload_bytes


def decode_header(data: bytes | bytearray | memoryview, payload_bytes: int) -> Header:
    """The header in `data`; raises FrameMalformed, also where its parts do not add up to `payload_bytes`."""
    try:
        kind, body, sizes = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise FrameMalformed("the header is not msgpack of kind, body and sizes") from error
    if not isinstance(kind, str) or len(kind) > KIND_CHARACTERS_MAX or not isinstance(sizes, list):
        raise FrameMalformed("the header's kind or sizes are of a wrong type or length")
    if len(sizes) > PARTS_COUNT_MAX:
        raise FrameTooLarge(f"{len(sizes)} parts, the limit is {PARTS_COUNT_MAX}")
    for size in sizes:
        if type(size) is not int or size < 0:
            raise FrameMalformed("the size of a part is not a count of bytes")
    if sum(sizes) != payload_bytes:
        raise FrameMalformed("the parts of the frame do not add up to its payload")
    return Header(kind, body, tuple(sizes))
