"""Latents to a buffer and back: each byte where it belongs, in each pair of formats, and no other touched."""

from contextlib import nullcontext

import pytest
import torch

from kernels.ops.backend import kernels_forced
from kernels.ops.copy_latents import (
    gather_latents,
    gather_latents_reference,
    scatter_latents,
    scatter_latents_reference,
)
from kernels.ops.copy_latents_kernel import gather_latents_kernel, scatter_latents_kernel
from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.latent_format import pack_latents_reference, unpack_latents_reference

TINY, ODD, V3 = (24, 8), (260, 6), (512, 64)
NUMBERS = (torch.bfloat16, torch.float32)
FORMATS = [
    *((dtype, dtype) for dtype in (*NUMBERS, torch.uint8)),
    *((dtype, torch.uint8) for dtype in NUMBERS),
    *((torch.uint8, dtype) for dtype in NUMBERS),
]
SLOTS = torch.tensor([5, -1, 0, 8])
SLOTS_COUNT = 9


def latents_of(shape: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random latents of some format."""
    numbers = torch.randn(*shape, sum(dims)) * torch.randn(*shape, 1).mul(8).exp2()
    if dtype != torch.uint8:
        return numbers.to(dtype)
    return pack_latents_reference(numbers.flatten(0, -2), dims[0]).view(*shape, packed_bytes(*dims))


def poisoned(shape: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Room for latents, all its bytes 0x7F: NaN in FP8, and what no test writes elsewhere."""
    row_bytes = packed_bytes(*dims) if dtype == torch.uint8 else sum(dims) * dtype.itemsize
    return torch.full((*shape, row_bytes), 0x7F, dtype=torch.uint8).view(dtype)


def converted(rows: torch.Tensor, dtype: torch.dtype, value_dim: int) -> torch.Tensor:
    """One row after the other, by the format's reference."""
    if rows.dtype == dtype:
        return rows
    return torch.stack(
        [
            pack_latents_reference(row[None], value_dim)[0]
            if dtype == torch.uint8
            else unpack_latents_reference(row[None], value_dim, dtype)[0]
            for row in rows
        ]
    )


def carried(run, source, target, slots, value_dim, device) -> torch.Tensor:
    """What a buffer, or pages, hold after a copy on a device, as bytes."""
    target = target.to(device, copy=True)
    run(source.to(device), slots.to(device), target, value_dim)
    return target.cpu().view(torch.uint8)


def expected_of(scatters, source, target, slots, value_dim) -> torch.Tensor:
    """The same, row by row in plain torch."""
    target = target.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            read, write = (token, slot) if scatters else (slot, token)
            for layer in range(len(source)):
                target[layer, write] = converted(source[layer, read : read + 1], target.dtype, value_dim)[0]
    return target.view(torch.uint8)


GATHERS = (gather_latents_kernel, gather_latents_reference)
SCATTERS = (scatter_latents_kernel, scatter_latents_reference)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize(("dims", "layers_count"), [(TINY, 5), (ODD, 1)], ids=str)
@pytest.mark.parametrize("run", (*GATHERS, *SCATTERS))
def test_bytes_are_those_of_the_format_and_other_rows_stay(run, dims, layers_count, formats, device):
    scatters = run in SCATTERS
    device = "cpu" if run in (GATHERS[1], SCATTERS[1]) else device
    shapes = [(layers_count, SLOTS_COUNT), (layers_count, len(SLOTS))]
    source_shape, target_shape = shapes[::-1] if scatters else shapes
    source = latents_of(source_shape, dims, formats[0])
    target = poisoned(target_shape, dims, formats[1])
    expected = expected_of(scatters, source, target, SLOTS, dims[0])
    assert torch.equal(carried(run, source, target, SLOTS, dims[0], device), expected)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_prompt_of_v3_goes_to_a_buffer_and_into_other_pages(formats, device):
    """One layer without a dimension for it, slots as int32."""
    pages = latents_of((SLOTS_COUNT,), V3, formats[0])
    slots = SLOTS[SLOTS >= 0].int()
    buffer = poisoned((len(slots),), V3, formats[1])
    sent = carried(gather_latents_kernel, pages, buffer, slots, 512, device).view(formats[1])
    assert torch.equal(sent.view(torch.uint8), converted(pages[slots], formats[1], 512).view(torch.uint8))
    there = poisoned((SLOTS_COUNT,), V3, formats[1])
    received = carried(scatter_latents_kernel, sent, there, slots + 0, 512, device).view(formats[1])
    assert torch.equal(received[slots].view(torch.uint8), sent.view(torch.uint8))


def test_codes_and_scales_are_right_at_every_border(device):
    """Greatest numbers at, below and above 448 times a power of two; halves between codes; tiny and huge."""
    limits = 448.0 * torch.tensor([1.0, 2.0**-7, 2.0**60, 2.0**-100, 2.0**-101])
    near = torch.stack([limits, limits.nextafter(torch.zeros(5)), limits.nextafter(torch.full((5,), 3e38))])
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
    halves = (codes[:127] + codes[1:128]) / 2
    rows = torch.zeros(24, 132)
    rows[:15, 0], rows[:15, 1] = near.flatten(), -near.flatten() * 0.73
    rows[15, :127], rows[16, :127], rows[17, :128] = halves, -halves, codes[128:]
    rows[15:18, 127] = 448.0
    rows[18, 5], rows[19, 5], rows[20, 5] = 3.4e38, 1e-40, -0.0
    rows[21, :128] = torch.linspace(-1, 1, 128)
    rows[22, :128] = torch.randn(128).mul(10).exp2()
    out = poisoned((24,), (128, 4), torch.uint8)
    packed = carried(gather_latents_kernel, rows, out, torch.arange(24), 128, device)
    assert torch.equal(packed, pack_latents_reference(rows, 128))


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan")])
def test_a_tile_that_is_not_finite_stays_so_and_others_finite(number, device):
    rows = torch.randn(2, 260 + 6)
    rows[1, 130] = number
    packed = carried(
        gather_latents_kernel, rows, poisoned((2,), ODD, torch.uint8), torch.arange(2), 260, device
    )
    back = unpack_latents_reference(packed, 260)
    assert back[1, 128:256].isnan().all()
    assert back[0].isfinite().all() and back[1, :128].isfinite().all() and back[1, 256:].isfinite().all()


@pytest.mark.parametrize("formats", FORMATS[:1] + FORMATS[2:4] + FORMATS[5:6], ids=str)
def test_rows_of_wider_memory_are_copied_alone(formats, device):
    """Layers, slots and numbers each a part of something larger, whose rest stays."""
    rows = latents_of((2, SLOTS_COUNT), TINY, formats[0])
    wide = torch.full((4, SLOTS_COUNT, rows.shape[-1] + 16), 0x7F, dtype=torch.uint8).to(formats[0])
    wide[::2, :, : rows.shape[-1]] = rows
    target = poisoned((2, len(SLOTS)), TINY, formats[1])
    room = torch.full((2, 2 * len(SLOTS), target.shape[-1] + 4), 0x7F, dtype=torch.uint8).to(formats[1])
    room = room.to(device)
    part = room[:, ::2, : target.shape[-1]]
    gather_latents_kernel(wide.to(device)[::2, :, : rows.shape[-1]], SLOTS.to(device), part, 24)
    expected = expected_of(False, rows, torch.full_like(target, 0x7F), SLOTS, 24)
    assert torch.equal(part.cpu().contiguous().view(torch.uint8), expected)
    assert (room[:, 1::2] == 0x7F).all() and (room[..., target.shape[-1] :] == 0x7F).all()


@pytest.mark.parametrize("slots", [torch.empty(0, dtype=torch.int64), torch.tensor([-1, -9])], ids=len)
@pytest.mark.parametrize("formats", FORMATS[2:4], ids=str)
@pytest.mark.parametrize("run", (*GATHERS, *SCATTERS))
def test_no_slots_carry_nothing(run, formats, slots, device):
    tokens_count = len(slots)
    counts = (tokens_count, SLOTS_COUNT) if run in SCATTERS else (SLOTS_COUNT, tokens_count)
    source = latents_of((3, counts[0]), TINY, formats[0])
    target = poisoned((3, counts[1]), TINY, formats[1])
    device = "cpu" if run in (GATHERS[1], SCATTERS[1]) else device
    assert torch.equal(carried(run, source, target, slots, 24, device), target.view(torch.uint8))


@pytest.mark.parametrize("forced", [True, False])
def test_the_operations_carry_as_their_references(forced, device):
    device = device if forced else torch.device("cpu")
    pages = latents_of((2, SLOTS_COUNT), TINY, torch.bfloat16)
    buffer, there = (poisoned((2, count), TINY, torch.uint8) for count in (len(SLOTS), SLOTS_COUNT))
    with kernels_forced() if forced and device.type == "cpu" else nullcontext():
        sent = carried(gather_latents, pages, buffer, SLOTS, 24, device)
        received = carried(scatter_latents, sent, there, SLOTS, 24, device)
    assert torch.equal(sent, expected_of(False, pages, buffer, SLOTS, 24))
    assert torch.equal(received, expected_of(True, sent, there, SLOTS, 24))


@pytest.mark.parametrize(
    ("source", "target", "slots"),
    [
        (torch.zeros(9, 32), torch.zeros(4, 33), SLOTS),
        (torch.zeros(9, 32), torch.zeros(4, 32), SLOTS[1:]),
        (torch.zeros(9, 32), torch.zeros(4, 32).bfloat16(), SLOTS),
        (torch.zeros(9, 32), torch.zeros(4, 43, dtype=torch.uint8), SLOTS),
        (torch.zeros(2, 9, 32), torch.zeros(3, 4, 32), SLOTS),
    ],
    ids=["row", "slots", "numbers of two kinds", "packed", "layers"],
)
def test_what_does_not_fit_is_refused(source, target, slots):
    with pytest.raises(ValueError, match="does not become"):
        gather_latents(source, slots, target, 24)
