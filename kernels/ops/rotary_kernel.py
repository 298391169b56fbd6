"""`rotate` on a GPU: several heads of one token a program, read in whole lines and turned in registers."""

import torch

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import to_dtype

NUMBERS_MAX = 2048  # of one program
WARP_NUMBERS = 512  # at least two 16-byte loads a thread: none is read twice, which in place would be a race


def rotate_kernel(
    hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool = True
) -> None:
    """As `rotate`, in one launch; numbers of a head lie in a row, heads and tokens anywhere."""
    tokens_count, heads_count, size = hidden.shape
    width = triton.next_power_of_2(max(size // 2, 1))
    heads = min(triton.next_power_of_2(max(heads_count, 1)), max(NUMBERS_MAX // (2 * width), 1))
    warps_count = max(min(heads * 2 * width // WARP_NUMBERS, 4), 1)
    strides = (*hidden.stride()[:2], cosines.stride(0), sines.stride(0))
    layout = (heads_count, heads, size // 2, width, interleaved)
    grid = (tokens_count, triton.cdiv(heads_count, heads))
    _rotate_heads[grid](hidden, cosines, sines, *strides, *layout, num_warps=warps_count)


@triton.jit
def _rotate_heads(
    hidden,
    cosines,
    sines,
    token_stride,
    head_stride,
    cosines_stride,
    sines_stride,
    HEADS_COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    rows = hidden + token * token_stride + head.to(tl.int64) * head_stride
    inside = head < HEADS_COUNT
    cosines += token * cosines_stride
    sines += token * sines_stride
    turn_rows(rows, rows, inside, True, cosines, sines, HEADS, PAIRS, WIDTH, INTERLEAVED)


@triton.jit
def turn_rows(
    source,
    target,
    inside,
    writes,
    cosines,
    sines,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn rows of `2 * PAIRS` numbers from where `source [ROWS]` points to where `target [ROWS]` does.

    `inside [ROWS]` says which rows there are, `writes` whether any is written; WIDTH is PAIRS or the next
    power of two. Numbers are rounded to the source's dtype before the target's, as if turned in place.
    """
    before: tl.constexpr = source.dtype.element_ty
    after: tl.constexpr = target.dtype.element_ty
    pair = tl.arange(0, WIDTH)
    cosine = tl.load(cosines + pair, mask=pair < PAIRS, other=0.0)[None, :]
    sine = tl.load(sines + pair, mask=pair < PAIRS, other=0.0)[None, :]
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        mask = inside[:, None] & (column < 2 * PAIRS)
        numbers = tl.load(source[:, None] + column, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(numbers, (ROWS, WIDTH, 2)))
        pairs = tl.join(first * cosine - second * sine, first * sine + second * cosine)
        turned = to_dtype(tl.reshape(pairs, (ROWS, 2 * WIDTH)), before).to(tl.float32)
        if writes:
            tl.store(target[:, None] + column, to_dtype(turned, after), mask=mask)
    else:
        column = pair[None, :]
        mask = inside[:, None] & (column < PAIRS)
        first = tl.load(source[:, None] + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + PAIRS + column, mask=mask, other=0.0).to(tl.float32)
        left = to_dtype(first * cosine - second * sine, before).to(tl.float32)
        right = to_dtype(first * sine + second * cosine, before).to(tl.float32)
        if writes:
            tl.store(target[:, None] + column, to_dtype(left, after), mask=mask)
            tl.store(target[:, None] + PAIRS + column, to_dtype(right, after), mask=mask)
