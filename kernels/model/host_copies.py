"""Tensors of a device brought to the host beside what the device computes, and back."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor that is where it will be read, or on its way there."""

    tensor: torch.Tensor
    arrived: torch.cuda.Event | None = None

    def wait(self) -> torch.Tensor:
        """The tensor, once it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


class HostCopies:
    """Begins copies on a stream of its own; a tensor that is on the host is its own copy."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def begin(self, tensor: torch.Tensor, is_to_host: bool = True) -> HostCopy:
        """Copy what the calling thread has had computed so far, without waiting; or only note when it is."""
        if not tensor.is_cuda:
            return HostCopy(tensor)
        if not is_to_host:
            computed = torch.cuda.Event()
            computed.record()
            return HostCopy(tensor, computed)
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            copy = host_memory(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        tensor.record_stream(self._stream)
        return HostCopy(copy, arrived)


def brought(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Tensors one below the other on a device; from the host in one copy, which is not waited for.

    Some may be there already: those that came from another GPU.
    """
    if any(part.device.type == device.type for part in parts):
        there = [part.to(device, non_blocking=True) for part in parts]
        return there[0] if len(there) == 1 else torch.cat(there)
    rows_count = sum(map(len, parts))
    whole = host_memory((rows_count, *parts[0].shape[1:]), parts[0].dtype)
    return torch.cat(list(parts), out=whole).to(device, non_blocking=True)


def check_device(device: torch.device) -> None:
    """Raises RuntimeError if a device has failed for good, as a GPU does after some errors."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_stream(device: torch.device) -> AbstractContextManager:
    """What the calling thread gives a GPU meanwhile waits for nothing that other threads gave it."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def host_memory(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host that a device copies from and to by itself, where there is one."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
