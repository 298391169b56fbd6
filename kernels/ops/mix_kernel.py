"""`mix` on a GPU: one program a token and part of its columns, which adds up in registers."""

import torch

from kernels.ops.backend import tl, triton

COLUMNS = 1024
SLOTS = 1024


def places_kernel(order: torch.Tensor) -> torch.Tensor:
    """Where each slot stands in an order of all, `[slots]` int32."""
    places = torch.empty(order.shape, dtype=torch.int32, device=order.device)
    _invert[(triton.cdiv(len(order), SLOTS),)](order, places, len(order), SLOTS)
    return places


def mix_kernel(outputs: torch.Tensor, weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """As `mix_placed`, in one launch."""
    tokens_count, choices_count = weights.shape
    size = outputs.shape[1]
    mixed = torch.empty(tokens_count, size, dtype=torch.float32, device=outputs.device)
    _mix_columns[(tokens_count, triton.cdiv(size, COLUMNS))](
        outputs, weights.contiguous(), places, mixed, outputs.stride(0), size, choices_count, COLUMNS
    )
    return mixed


@triton.jit
def _invert(order, places, slots_count, SLOTS: tl.constexpr):
    numbers = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    slots = tl.load(order + numbers, mask=numbers < slots_count, other=0)
    tl.store(places + slots, numbers, mask=numbers < slots_count)


@triton.jit
def _mix_columns(
    outputs,
    weights,
    places,
    mixed,
    row_stride,
    SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice).to(tl.int64)
        weight = tl.load(weights + token * CHOICES + choice).to(tl.float32)
        # A slot of nobody has no output, and its weight may be anything: neither takes part.
        is_read = columns < tl.where(place >= 0, SIZE, 0)
        numbers = tl.load(outputs + place * row_stride + columns, mask=is_read, other=0.0).to(tl.float32)
        total += tl.where(place >= 0, weight, 0.0) * numbers
    tl.store(mixed + token * SIZE + columns, total, mask=columns < SIZE)
