"""Tensors to bytes and back: the same memory, the same bits, and no size but the right one."""

import math

import pytest
import torch

from kernels.transport.tensors import DTYPES, NAMES, as_bytes, from_bytes

SHAPES = [(), (1,), (7,), (3, 5), (2, 1, 4), (0,), (3, 0)]


def numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 100, shape).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_comes_back(name, shape):
    tensor = numbers(DTYPES[name], shape)
    data = as_bytes(tensor)
    assert (data.format, data.ndim, data.nbytes) == ("B", 1, math.prod(shape) * tensor.element_size())
    back = from_bytes(memoryview(bytearray(data)), DTYPES[NAMES[tensor.dtype]], shape)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_bits_that_are_no_numbers_come_back(name):
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=DTYPES[name])
    back = from_bytes(memoryview(bytearray(as_bytes(tensor))), tensor.dtype, (4,))
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_nothing_is_copied():
    tensor = torch.zeros(4, dtype=torch.int32)
    data = as_bytes(tensor)
    data[4] = 7
    assert tensor.tolist() == [0, 7, 0, 0]
    from_bytes(data, torch.int32, (2, 2))[1, 1] = 9
    assert tensor.tolist() == [0, 7, 0, 9]


def test_a_row_of_a_larger_tensor_is_its_own_bytes():
    cache = torch.zeros(3, 4, dtype=torch.bfloat16)
    as_bytes(cache[1])[:] = bytes(torch.ones(4, dtype=torch.bfloat16).view(torch.uint8).tolist())
    assert cache.tolist() == [[0] * 4, [1] * 4, [0] * 4]


def test_the_bytes_keep_the_tensor_alive():
    data = as_bytes(torch.full((1000,), 5, dtype=torch.uint8))
    torch.full((1000,), 6, dtype=torch.uint8)
    assert set(data) == {5}


@pytest.mark.parametrize(
    "strided", [torch.zeros(4, 4).T[1:], torch.zeros(4, 2)[:, :1], torch.zeros(8, dtype=torch.uint8)[::2]]
)
def test_a_strided_tensor_is_refused(strided):
    with pytest.raises(ValueError, match="contiguous"):
        as_bytes(strided)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (0, (1,)),
        (0, (2, 3)),
        (4, (0,)),
        (7, (2,)),
        (8, (3,)),
        (12, (2,)),
        (8, (-1, -2)),
        (8, (-2,)),
        (0, (-1, 0)),
    ],
)
def test_another_size_is_refused(size, shape):
    with pytest.raises(ValueError, match="are not a tensor"):
        from_bytes(memoryview(bytearray(size)), torch.float32, shape)
