"""The draw of `sample` on a GPU, without a sort: two launches, or three if a row has top-k or top-p.

1. Each block of each row weighs its tokens: their sum, and how many weights have how many bits.
2. A row without top-k and top-p: the block in which its running sum passes the target draws. Else each block
   lists its tokens of so many bits that all that can be kept are among them: few with top-k, but most with
   top-p where all are alike.
3. For each row with a list: the border by digits from the highest, eight pivots at a time; then the draw.

A listed token is one number, `weight << id bits | last id - id`: no two are equal, and of equal weights the
lower id is greater. What top-k and top-p keep is thus all from some number on.

Integers are the same everywhere. Only exp2 in float64 may differ by an ulp from a CPU's, which moves a weight
by one of 2^40 now and then, and the token drawn about once in 10^12 draws.
"""

import math

import torch
from torch import Tensor

from kernels.ops.backend import tl, triton
from kernels.ops.sample_kernel import BLOCK_TOKENS, contiguous_rows

ASKED = ("temperature", "top_k", "top_p", "min_p", "uniform")  # columns; temperature 0: not drawn
CHUNK_TOKENS = 1024  # of a list, at a time
ASKED_COUNT = tl.constexpr(len(ASKED))
WEIGHT_ONE_BITS = tl.constexpr(40)
WEIGHT_ONE = tl.constexpr(2.0**40)
ROUNDING = tl.constexpr(2.0**52)  # what is added to it is rounded to an integer, nearest even,
ROUNDING_BITS = tl.constexpr(0x4330000000000000)  # which are then the low bits
LOG2_E = tl.constexpr(math.log2(math.e))
TEMPERATURE_MIN = tl.constexpr(1e-260)  # beyond these two no weight changes any more,
TEMPERATURE_MAX = tl.constexpr(1e260)  # and between them no exponent is infinite by itself
LENGTHS = tl.constexpr(64)  # more than a weight has bits
DIGIT_BITS = tl.constexpr(3)
PIVOTS = tl.constexpr(8)
INT64_MAX = tl.constexpr(2**63 - 1)


def draw_kernel(logits: Tensor, best: Tensor, token_ids: Tensor, asked: Tensor, ranks: bool) -> None:
    """Overwrite `token_ids` [rows] int64 of the rows with a temperature by what they draw from their logits.

    `logits` [rows, vocab] fp32, `best` [rows] their greatest, `asked` [rows, 5] fp64 as ASKED says; `ranks`:
    whether any row has top-k or top-p. Rows with NaN or infinity keep the ids that they have.
    """
    logits = contiguous_rows(logits)
    rows_count, vocab = logits.shape
    blocks_count, id_bits = triton.cdiv(vocab, BLOCK_TOKENS), (vocab - 1).bit_length()
    grid, width = (rows_count, blocks_count), triton.next_power_of_2(blocks_count)
    integers = {"dtype": torch.int64, "device": logits.device}
    sums = torch.empty(grid, **integers)
    lengths = torch.empty((*grid, LENGTHS.value if ranks else 0), dtype=torch.int32, device=logits.device)
    listed = torch.empty((rows_count, vocab if ranks else 0), **integers)
    _weigh_block[grid](
        logits, best, asked, sums, lengths, logits.stride(0), vocab, BLOCK_TOKENS, ranks, num_warps=4
    )
    _draw_or_list_block[grid](
        logits, best, asked, sums, lengths, listed, token_ids,
        logits.stride(0), vocab, id_bits, BLOCK_TOKENS, width, ranks, num_warps=4,
    )  # fmt: skip
    if ranks:
        _draw_ranked_row[(rows_count,)](
            best, asked, sums, lengths, listed, token_ids,
            vocab, id_bits, blocks_count, width, CHUNK_TOKENS, num_warps=8,
        )  # fmt: skip


@triton.jit
def _weigh_block(
    logits, best, asked, sums, lengths, logits_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _is_drawn(asked, best, row) == 0:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    weights = _weights(logits + row * logits_stride, ids, VOCAB, best, asked, row)
    at = row * tl.num_programs(1) + block
    if _is_ranked(asked, row):
        if RANKS:
            bits = tl.arange(0, LENGTHS)
            tl.store(lengths + at * LENGTHS + bits, tl.histogram(_length(weights), LENGTHS))
    else:
        weights = tl.where(weights >= _weight_min(asked, row), weights, 0)
    tl.store(sums + at, tl.sum(weights))


@triton.jit
def _draw_or_list_block(
    logits, best, asked, sums, lengths, listed, token_ids, logits_stride,
    VOCAB: tl.constexpr, ID_BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks_count = tl.num_programs(1)
    if _is_drawn(asked, best, row) == 0:
        return
    blocks = tl.arange(0, BLOCKS_WIDTH)
    block_sums = tl.load(sums + row * blocks_count + blocks, mask=blocks < blocks_count, other=0)
    total = tl.sum(block_sums)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    row_logits = logits + row * logits_stride
    if _is_ranked(asked, row):
        if RANKS:
            by_block = _lengths_of(lengths, row, blocks_count, BLOCKS_WIDTH)
            length_min = _length_min(asked, row, tl.sum(by_block, axis=0), total)
            earlier = tl.where((blocks < block)[:, None], by_block, 0)
            listed_before = _count_from(tl.sum(earlier, axis=0), length_min)
            weights = _weights(row_logits, ids, VOCAB, best, asked, row)
            _list(listed + row * VOCAB + listed_before, weights, ids, length_min, ID_BITS)
    else:
        sum_before = tl.sum(tl.where(blocks < block, block_sums, 0))
        sum_through = tl.sum(tl.where(blocks <= block, block_sums, 0))
        target = _target(asked, row, total)
        if (sum_before <= target) & (target < sum_through):
            weights = _weights(row_logits, ids, VOCAB, best, asked, row)
            weights = tl.where(weights >= _weight_min(asked, row), weights, 0)
            passed = (sum_before + tl.cumsum(weights) <= target) & (ids < VOCAB)
            tl.store(token_ids + row, block * BLOCK + tl.sum(passed.to(tl.int64)))


@triton.jit
def _draw_ranked_row(
    best, asked, sums, lengths, listed, token_ids,
    VOCAB: tl.constexpr, ID_BITS: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    is_listed = _is_drawn(asked, best, row) & _is_ranked(asked, row)
    if is_listed == 0:
        return
    blocks = tl.arange(0, BLOCKS_WIDTH)
    total = tl.sum(tl.load(sums + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=0))
    by_length = tl.sum(_lengths_of(lengths, row, BLOCKS, BLOCKS_WIDTH), axis=0)
    length_min, top_k = _length_min(asked, row, by_length, total), _top_k(asked, row, by_length)
    listed_count = _count_from(by_length, length_min)
    numbers = listed + row * VOCAB
    border = _weight_min(asked, row) << ID_BITS
    if top_k > 0:
        rank_border, total = _border(numbers, listed_count, top_k, True, ID_BITS, CHUNK)
        border = tl.maximum(border, rank_border)
    top_p = tl.load(asked + row * ASKED_COUNT + 2)
    if top_p < 1:
        reach = _reach(top_p, total)
        rank_border, total = _border(numbers, listed_count, reach, False, ID_BITS, CHUNK)
        border = tl.maximum(border, rank_border)
    total = _sum_from(numbers, listed_count, border, ID_BITS, CHUNK)
    target = _target(asked, row, total)
    place = _passed_count(numbers, listed_count, border, target, ID_BITS, CHUNK)
    last_id = (1 << ID_BITS) - 1
    tl.store(token_ids + row, last_id - (tl.load(numbers + place) & last_id))


@triton.jit
def _weights(row_logits, ids, VOCAB: tl.constexpr, best, asked, row):
    """Weights int64 of tokens; 0 beyond the vocabulary."""
    logits = tl.load(row_logits + ids, mask=ids < VOCAB, other=-float("inf")).to(tl.float64)
    temperature = tl.load(asked + row * ASKED_COUNT)
    temperature = tl.minimum(tl.maximum(temperature, TEMPERATURE_MIN), TEMPERATURE_MAX)
    steepness = tl.full((), LOG2_E, tl.float64) / temperature
    likelihood = tl.exp2((logits - tl.load(best + row).to(tl.float64)) * steepness)
    return (likelihood * WEIGHT_ONE + ROUNDING).to(tl.int64, bitcast=True) - ROUNDING_BITS


@triton.jit
def _length(weights):
    """How many bits each weight has, int32, 0 for 0: what float64 keeps as its exponent."""
    exponents = weights.to(tl.float64).to(tl.int64, bitcast=True) >> 52
    return tl.maximum(exponents - 1022, 0).to(tl.int32)


@triton.jit
def _is_drawn(asked, best, row):
    """Whether a row has a temperature, and numbers for logits."""
    return (tl.load(asked + row * ASKED_COUNT) > 0) & (tl.abs(tl.load(best + row)) < float("inf"))


@triton.jit
def _is_ranked(asked, row):
    """Whether a row has top-k or top-p."""
    top_k, top_p = tl.load(asked + row * ASKED_COUNT + 1), tl.load(asked + row * ASKED_COUNT + 2)
    return (top_k > 0) | (top_p < 1)


@triton.jit
def _weight_min(asked, row):
    """The least weight that min-p keeps."""
    return _ceiling(tl.load(asked + row * ASKED_COUNT + 3) * WEIGHT_ONE)


@triton.jit
def _target(asked, row, total):
    """What the running sum must pass, below the total."""
    uniform = tl.load(asked + row * ASKED_COUNT + 4)
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _ceiling(number):
    below = number.to(tl.int64)
    return below + (below.to(tl.float64) < number).to(tl.int64)


@triton.jit
def _reach(top_p, total):
    """The least sum that is not short of `top_p` of the total when both are read as float64."""
    share = top_p * total.to(tl.float64)
    reach = _ceiling(share)
    for step in tl.static_range(10):  # sums below 2^62 are rounded to multiples of 1024 at most
        lower = reach - (512 >> step)
        reach = tl.where(lower.to(tl.float64) >= share, lower, reach)
    return tl.maximum(reach, 1)


@triton.jit
def _lengths_of(lengths, row, blocks_count, BLOCKS_WIDTH: tl.constexpr):
    """How many tokens of each block of a row have weights of so many bits, 0 for those of no bits."""
    blocks, bits = tl.arange(0, BLOCKS_WIDTH)[:, None], tl.arange(0, LENGTHS)[None, :]
    at = (row * blocks_count + blocks) * LENGTHS + bits
    return tl.load(lengths + at, mask=(blocks < blocks_count) & (bits > 0), other=0).to(tl.int64)


@triton.jit
def _top_k(asked, row, by_length):
    """How many tokens top-k keeps, 0 for all."""
    top_k = tl.load(asked + row * ASKED_COUNT + 1).to(tl.int64)
    return tl.where(top_k < tl.sum(by_length), top_k, 0)


@triton.jit
def _length_min(asked, row, by_length, total):
    """From how many bits on weights are listed, so that all that top-k and top-p keep are among them."""
    bits = tl.arange(0, LENGTHS)
    count_from = tl.sum(by_length) - (tl.cumsum(by_length) - by_length)
    at_most = by_length * (tl.full((LENGTHS,), 1, tl.int64) << tl.minimum(bits, WEIGHT_ONE_BITS))
    sum_from_min = total - (tl.cumsum(at_most) - at_most)  # so much remains at least without the lighter ones
    top_k, top_p = _top_k(asked, row, by_length), tl.load(asked + row * ASKED_COUNT + 2)
    enough = tl.where(top_k > 0, count_from >= top_k, sum_from_min >= _reach(tl.minimum(top_p, 1.0), total))
    return tl.max(tl.where(enough, bits, 1))


@triton.jit
def _count_from(by_length, length_min):
    return tl.sum(tl.where(tl.arange(0, LENGTHS) >= length_min, by_length, 0))


@triton.jit
def _list(place, weights, ids, length_min, ID_BITS: tl.constexpr):
    """Write tokens of so many bits one after the other, each as one number."""
    heavy = (weights >> (length_min - 1)) > 0
    places = place + tl.cumsum(heavy.to(tl.int32)) - 1
    tl.store(places, (weights << ID_BITS) | ((1 << ID_BITS) - 1 - ids), mask=heavy)


@triton.jit
def _border(numbers, count, need, by_count, ID_BITS: tl.constexpr, CHUNK: tl.constexpr):
    """The greatest border from which listed numbers are `need`, or their weights sum to it; and that sum.

    Stops when one number is left between what is enough and what is not.
    """
    border, total = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    beyond_count = tl.full((), 0, tl.int64)
    shift = tl.full((), (WEIGHT_ONE_BITS + ID_BITS) // DIGIT_BITS * DIGIT_BITS, tl.int32)
    undecided = count
    while (shift >= 0) & (undecided > 1):
        pivots = border + (tl.arange(0, PIVOTS).to(tl.int64) << shift)
        counts, sums = _from_pivots(numbers, count, pivots, ID_BITS, CHUNK)
        enough = tl.where(by_count, counts, sums) >= need
        enough_count = tl.min(tl.where(enough, counts, INT64_MAX))
        beyond_count = tl.maximum(beyond_count, tl.max(tl.where(enough, 0, counts)))
        total = tl.min(tl.where(enough, sums, INT64_MAX))
        border = tl.max(tl.where(enough, pivots, border))
        undecided = enough_count - beyond_count
        shift -= DIGIT_BITS
    return border, total


@triton.jit
def _from_pivots(numbers, count, pivots, ID_BITS: tl.constexpr, CHUNK: tl.constexpr):
    """How many listed numbers are not below each pivot, and the sums of their weights."""
    counts, sums = tl.zeros((PIVOTS,), tl.int64), tl.zeros((PIVOTS,), tl.int64)
    start = count * 0
    while start < count:
        places = start + tl.arange(0, CHUNK)
        chunk = tl.load(numbers + places, mask=places < count, other=-1)[:, None]
        among = chunk >= pivots[None, :]
        counts += tl.sum(among.to(tl.int32), axis=0).to(tl.int64)
        sums += tl.sum(tl.where(among, chunk >> ID_BITS, 0), axis=0)
        start += CHUNK
    return counts, sums


@triton.jit
def _sum_from(numbers, count, border, ID_BITS: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of the weights of listed numbers from the border on."""
    total, start = count * 0, count * 0
    while start < count:
        total += tl.sum(_kept(numbers, start + tl.arange(0, CHUNK), count, border, ID_BITS))
        start += CHUNK
    return total


@triton.jit
def _passed_count(numbers, count, border, target, ID_BITS: tl.constexpr, CHUNK: tl.constexpr):
    """How many tokens of the list the running sum of what is kept takes to pass the target."""
    passed_count, before, start = count * 0, count * 0, count * 0
    while (start < count) & (before <= target):
        places = start + tl.arange(0, CHUNK)
        kept = _kept(numbers, places, count, border, ID_BITS)
        passed = (before + tl.cumsum(kept) <= target) & (places < count)
        passed_count += tl.sum(passed.to(tl.int64))
        before += tl.sum(kept)
        start += CHUNK
    return passed_count


@triton.jit
def _kept(numbers, places, count, border, ID_BITS: tl.constexpr):
    """Weights of the list at some places; 0 below the border."""
    chunk = tl.load(numbers + places, mask=places < count, other=-1)
    return tl.where(chunk >= border, chunk >> ID_BITS, 0)
