"""Parts on a device: named in headers, checked, and cut so that both ends agree."""

import random

import pytest
import torch

from kernels.transport.device_parts import cut, device_sizes, flat, pour, split_chosen, unwrap, wrap
from kernels.transport.errors import FrameMalformed, FrameTooLarge
from kernels.transport.frame import PARTS_COUNT_MAX, Frame, FrameLimits, Header

LIMITS = FrameLimits(payload_bytes_max=1000)


def test_parts_on_the_device_are_named_and_the_others_follow():
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    body, views, tensors = wrap({"layer": 1}, [memoryview(b"abc"), tensor, memoryview(b""), torch.empty(0)])
    assert body == [{"layer": 1}, [None, 24, None, 0]]
    header = unwrap(Frame("latents", body, views), LIMITS)
    assert header == Header("latents", {"layer": 1}, (3, 24, 0, 0), (False, True, False, True))
    assert (device_sizes(header), header.payload_bytes) == ([24, 0], 27)
    assert [part.nbytes for part in tensors] == [24, 0]


def test_a_frame_without_parts_on_the_device_says_so_in_a_word():
    body, views, tensors = wrap(7, [memoryview(b"abc")])
    assert (body, tensors) == ([7, None], [])
    assert unwrap(Frame("plain", body, views), LIMITS) == Header("plain", 7, (3,))


@pytest.mark.parametrize(
    "body",
    [
        *(None, 5, [], [1], [1, None, 2], [1, 5], [1, {}], [1, [5]], [1, [None, None]]),
        *([1, [None, -1]], [1, [None, True]], [1, [None, 1.0]], [1, [None, "5"]]),
    ],
    ids=str,
)
def test_a_body_that_does_not_say_where_its_parts_are_is_malformed(body):
    with pytest.raises(FrameMalformed):
        unwrap(Frame("kind", body, [memoryview(b"ab")]), LIMITS)


@pytest.mark.parametrize("places", [[None, 999], [None, 500, 500], [None] + [0] * PARTS_COUNT_MAX])
def test_more_than_the_limits_allow_is_too_large(places):
    with pytest.raises(FrameTooLarge):
        unwrap(Frame("kind", [1, places], [memoryview(b"ab")]), LIMITS)


def test_memory_chosen_must_fit_on_each_side_of_the_border():
    header = Header("kind", None, (3, 8), (False, True))
    views, tensors = split_chosen(
        header, [torch.empty(2), memoryview(bytearray(2)), memoryview(bytearray(1))]
    )
    assert ([len(view) for view in views], [part.nbytes for part in tensors]) == ([2, 1], [8])
    for wrong in ([memoryview(bytearray(11))], [torch.empty(11, dtype=torch.uint8)], [torch.empty(2)], []):
        with pytest.raises(FrameMalformed, match="memory chosen"):
            split_chosen(header, wrong)


def test_a_flat_tensor_is_the_same_memory():
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    flat(tensor)[:2] = torch.tensor([0x80, 0x3F], dtype=torch.uint8)
    assert tensor[0, 0] == 1
    assert flat(torch.tensor(1.0)).shape == (4,)
    assert flat(torch.empty(0, 5)).shape == (0,)
    with pytest.raises(ValueError, match="contiguous"):
        flat(torch.zeros(4, 4).T)


def pieces_of(size: int) -> list[int]:
    cuts = sorted(random.sample(range(1, size), random.randint(0, min(size - 1, 6))))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, size], strict=True)]


def test_both_ends_cut_alike_and_lose_nothing():
    for _ in range(100):
        size = random.randint(1, 60)
        ours, theirs = pieces_of(size), pieces_of(size)
        source = torch.randint(0, 256, (size,), dtype=torch.uint8)
        target = torch.zeros(size, dtype=torch.uint8)
        sent, received = cut(source.split(ours), theirs), cut(target.split(theirs), ours)
        assert [len(piece) for piece in sent] == [len(piece) for piece in received]
        assert all(len(piece) for piece in sent)
        for here, there in zip(sent, received, strict=True):
            there.copy_(here)
        assert torch.equal(source, target)


def test_bytes_are_poured_wherever_they_are_cut():
    for _ in range(100):
        size = random.randint(1, 60)
        source, target = random.randbytes(size), bytearray(size)
        pour(views_of(source, pieces_of(size)), views_of(target, pieces_of(size)))
        assert target == source
    pour([memoryview(b"")], [])


def views_of(data: bytes | bytearray, sizes: list[int]) -> list[memoryview]:
    views, begin = [], 0
    for size in sizes:
        views.append(memoryview(data)[begin : begin + size])
        begin += size
    return views
