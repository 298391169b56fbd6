"""Parts of frames that lie in the memory of a GPU: how a header names them, and where two ends cut them.

On a device channel a frame's body goes wrapped, `[body, places]`: for each part the bytes of one on the
device, nil for one that follows the header; nil for all where none is on the device.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import torch

from kernels.transport.errors import FrameMalformed, FrameTooLarge
from kernels.transport.frame import PARTS_COUNT_MAX, Body, Buffers, Frame, FrameLimits, Header, Part


def wrap(body: Body, parts: Sequence[Part]) -> tuple[Body, list[memoryview], list[torch.Tensor]]:
    """What goes in the header, what follows it, and what goes between the GPUs; raises ValueError."""
    views = [part for part in parts if not isinstance(part, torch.Tensor)]
    tensors = [flat(part) for part in parts if isinstance(part, torch.Tensor)]
    if not tensors:
        return [body, None], views, tensors
    places = [part.nbytes if isinstance(part, torch.Tensor) else None for part in parts]
    return [body, places], views, tensors


def unwrap(frame: Frame, limits: FrameLimits) -> Header:
    """The header as its sender meant it; raises FrameMalformed or FrameTooLarge."""
    if not isinstance(frame.body, list) or len(frame.body) != 2:
        raise FrameMalformed(f"a frame {frame.kind!r:.40} that does not say where its parts are")
    body, places = frame.body
    sizes = iter([part.nbytes for part in frame.parts])
    if places is None:
        return Header(frame.kind, body, tuple(sizes))
    if not isinstance(places, list) or places.count(None) != len(frame.parts):
        raise FrameMalformed(f"the places of {frame.kind!r:.40} are not one for each part")
    if len(places) > PARTS_COUNT_MAX:
        raise FrameTooLarge(f"{len(places)} parts, the limit is {PARTS_COUNT_MAX}")
    if any(place is not None and (type(place) is not int or place < 0) for place in places):
        raise FrameMalformed("the size of a part on a device is not a count of bytes")
    part_sizes = tuple(next(sizes) if place is None else place for place in places)
    if sum(part_sizes) > limits.payload_bytes_max:
        raise FrameTooLarge(f"payload of {sum(part_sizes)} bytes, the limit is {limits.payload_bytes_max}")
    return Header(frame.kind, body, part_sizes, tuple(place is not None for place in places))


def device_sizes(header: Header) -> list[int]:
    """Bytes of each part on the device."""
    return [size for size, there in zip(header.part_sizes, header.on_device, strict=False) if there]


def split_chosen(header: Header, chosen: Buffers) -> tuple[list[memoryview], list[torch.Tensor]]:
    """The chosen memory as views and flat tensors; raises FrameMalformed where either does not fit."""
    views = [part.cast("B") for part in chosen if not isinstance(part, torch.Tensor) and part.nbytes]
    tensors = [flat(part) for part in chosen if isinstance(part, torch.Tensor) and part.nbytes]
    device_bytes = sum(device_sizes(header))
    fits = sum(part.nbytes for part in tensors) == device_bytes
    if not fits or sum(map(len, views)) != header.payload_bytes - device_bytes:
        raise FrameMalformed(f"the payload of {header.kind!r:.40} does not fit the memory chosen for it")
    return views, tensors


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as uint8 `[bytes]`, not copied; raises ValueError."""
    if not tensor.is_contiguous():
        raise ValueError("only a contiguous tensor can be carried without a copy; call contiguous() first")
    return tensor.detach().view(-1).view(torch.uint8)


def cut(parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Flat `parts` cut where `sizes` end too, so that both ends of a transfer have pieces of equal sizes.

    Neither holds an empty one.
    """
    ends, pieces, begin = list(accumulate(sizes)), [], 0
    for part in parts:
        inside = ends[bisect_right(ends, begin) : bisect_left(ends, begin + part.nbytes)]
        pieces += torch.tensor_split(part, [end - begin for end in inside])
        begin += part.nbytes
    return pieces


def pour(source: Sequence[memoryview], target: Sequence[memoryview]) -> None:
    """Copy views of bytes into others of the same size together, wherever each is cut."""
    waiting = deque(part for part in source if len(part))
    for room in target:
        while len(room):
            piece = waiting.popleft()
            size = min(len(piece), len(room))
            room[:size], room = piece[:size], room[size:]
            if size < len(piece):
                waiting.appendleft(piece[size:])
