"""Tensors as the flat bytes that channels carry, without copying them."""

import math

import torch

from kernels.transport.frame import Part

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes, which keep it alive; raises ValueError."""
    if not tensor.is_contiguous():
        raise ValueError("only a contiguous tensor can be carried without a copy; call contiguous() first")
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def from_bytes(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over `data`, which must be writable and of just the size of `shape`; raises ValueError."""
    wanted = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or data.nbytes != wanted:
        raise ValueError(f"{data.nbytes} bytes are not a tensor {list(shape)} of {dtype}, which has {wanted}")
    if wanted == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def as_tensor(part: Part, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A received part, of the host or of a device, as a tensor; raises ValueError for one of another size."""
    if not isinstance(part, torch.Tensor):
        return from_bytes(part, dtype, shape)
    if part.nbytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{part.nbytes} bytes are not a tensor {list(shape)} of {dtype}")
    return part.view(torch.uint8).view(dtype).view(shape)
