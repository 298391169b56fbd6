"""The greatest logit of each row on a GPU, which is all that a greedy token needs: two launches."""

import torch
from torch import Tensor

from kernels.ops.backend import tl, triton

BLOCK_TOKENS = 2048  # of a row, for one program: so that one row alone occupies many multiprocessors
NAN_RANK = tl.constexpr(2**31 - 1)  # above infinity's, so that a NaN is a row's best logit and is seen
ID_BITS_MASK = tl.constexpr(2**32 - 1)


def best_kernel(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row of `logits` [rows, vocab] fp32, as `logits.max(dim=-1)`: [rows] fp32, int64.

    Of equal logits the lowest token id counts; a row with a NaN has a NaN.
    """
    logits = contiguous_rows(logits)
    rows_count, vocab = logits.shape
    blocks_count = triton.cdiv(vocab, BLOCK_TOKENS)
    ranks = torch.empty((rows_count, blocks_count), dtype=torch.int64, device=logits.device)
    best = torch.empty(rows_count, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(rows_count, dtype=torch.int64, device=logits.device)
    _best_of_block[(rows_count, blocks_count)](logits, ranks, logits.stride(0), vocab, BLOCK_TOKENS)
    _best_of_row[(rows_count,)](
        ranks, best, token_ids, blocks_count, triton.next_power_of_2(blocks_count), num_warps=1
    )
    return best, token_ids


def contiguous_rows(logits: Tensor) -> Tensor:
    """The logits with neighbouring tokens side by side; a copy only if they are not."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


@triton.jit
def _best_of_block(logits, ranks, logits_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """One number tells logit and id, so that equal logits are ordered too and the best is a maximum."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < VOCAB
    numbers = tl.load(logits + row * logits_stride + ids, mask=inside, other=-float("inf"))
    bits = tl.where(numbers == 0.0, 0.0, numbers).to(tl.int32, bitcast=True)  # -0 equals 0
    order = tl.where(numbers == numbers, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN_RANK)  # as the floats go
    rank = (order.to(tl.int64) << 32) | (ids.to(tl.int64) ^ ID_BITS_MASK)
    tl.store(ranks + row * tl.num_programs(1) + block, tl.max(rank))


@triton.jit
def _best_of_row(ranks, best, token_ids, BLOCKS: tl.constexpr, BLOCKS_WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS_WIDTH)
    rank = tl.max(tl.load(ranks + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=-(2**63)))
    order = (rank >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    tl.store(best + row, bits.to(tl.float32, bitcast=True))
    tl.store(token_ids + row, (rank & ID_BITS_MASK) ^ ID_BITS_MASK)
