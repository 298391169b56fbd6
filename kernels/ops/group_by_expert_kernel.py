"""`group_by_expert` on a GPU: few slots by counting those before each, many by sorting blocks of them.

However many slots there are, the same programs serve: they loop as far as they are told when they run.

No atomic additions to memory: what order they happen in would be the order of the slots.
"""

import torch

from kernels.ops.backend import tl, triton

COUNTED_SLOTS_MAX = 4096  # beyond, comparing all with all takes longer than a second launch
COUNTED_PLACES = 16
COUNTED_SLOTS = 512
COUNTED_REGISTERS_MAX = 80  # of a thread: three programs on a processor, so that all run in one wave
BLOCK_SLOTS = 2048
BLOCKS_READ = 16


def group_by_expert_kernel(
    expert_ids: torch.Tensor, experts_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `group_by_expert`, in one launch for few slots and in two for many."""
    slots_count = expert_ids.numel()
    if slots_count <= COUNTED_SLOTS_MAX:
        return group_by_counting(expert_ids, experts_count)
    return group_by_sorting(expert_ids, experts_count)


def group_by_counting(
    expert_ids: torch.Tensor, experts_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For few slots: each program finds the places of some by comparing them with all."""
    ids = expert_ids.reshape(-1)
    grouped = _empty_groups(ids, experts_count)
    places_count = len(ids) + experts_count + 1
    _count_before[(triton.cdiv(places_count, COUNTED_PLACES),)](
        ids,
        *grouped,
        len(ids),
        experts_count,
        COUNTED_PLACES,
        COUNTED_SLOTS,
        num_warps=8,
        maxnreg=COUNTED_REGISTERS_MAX,
    )
    return grouped


def group_by_sorting(
    expert_ids: torch.Tensor, experts_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For many slots: count each block's by expert, then sort each block and put it in its places."""
    ids = expert_ids.reshape(-1)
    grouped = _empty_groups(ids, experts_count)
    blocks_count = triton.cdiv(len(ids), BLOCK_SLOTS)
    width = triton.next_power_of_2(experts_count + 1)
    counts = torch.empty(blocks_count, width, dtype=torch.int32, device=ids.device)
    _count_block[(blocks_count,)](ids, counts, len(ids), experts_count, BLOCK_SLOTS, width, num_warps=8)
    _place_block[(blocks_count,)](
        ids,
        counts,
        *grouped,
        len(ids),
        experts_count,
        blocks_count,
        BLOCK_SLOTS,
        BLOCKS_READ,
        width,
        num_warps=8,
    )
    return grouped


def _empty_groups(ids: torch.Tensor, experts_count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = (len(ids), experts_count + 1, len(ids))
    return tuple(torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes)


@triton.jit
def _experts_of(ids, slots, slots_count, experts_count):
    """int32 experts of some slots; nobody's, and what lies beyond the last slot, is the number of experts."""
    experts = tl.load(ids + slots, mask=slots < slots_count, other=-1)
    return tl.where((experts >= 0) & (experts < experts_count), experts, experts_count).to(tl.int32)


@triton.jit(do_not_specialize=["slots_count"])
def _count_before(
    ids,
    order,
    offsets,
    places,
    slots_count,
    experts_count,
    PLACES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A slot's place is the number of slots before it; an expert begins after those of lower ones."""
    mine = tl.program_id(0) * PLACES + tl.arange(0, PLACES)  # the slots, then the beginnings of the experts
    is_slot = mine < slots_count
    expert = tl.where(is_slot, _experts_of(ids, mine, slots_count, experts_count), mine - slots_count)
    key = expert * slots_count + tl.where(is_slot, mine, 0)
    before = tl.zeros([PLACES, SLOTS], tl.int32)
    begin = 0
    while begin < slots_count:
        others = begin + tl.arange(0, SLOTS)
        keys = _experts_of(ids, others, slots_count, experts_count) * slots_count + others
        # The sign of a difference: to add up what a comparison says, the compiler would spill.
        before += ((keys[None, :] - key[:, None]).to(tl.uint32) >> 31).to(tl.int32)
        begin += SLOTS
    place = tl.sum(before, axis=1)
    tl.store(order + place, mine, mask=is_slot)
    tl.store(places + mine, tl.where(expert < experts_count, place, -1), mask=is_slot)
    tl.store(offsets + expert, place, mask=(mine >= slots_count) & (expert <= experts_count))


@triton.jit(do_not_specialize=["slots_count"])
def _count_block(ids, counts, slots_count, experts_count, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """How many slots of a block each expert has; after the experts, how many are nobody's."""
    block = tl.program_id(0)
    slots = block * SLOTS + tl.arange(0, SLOTS)
    counted = tl.histogram(_experts_of(ids, slots, slots_count, experts_count), WIDTH)
    tl.store(counts + block * WIDTH + tl.arange(0, WIDTH), counted)


@triton.jit(do_not_specialize=["slots_count", "blocks_count"])
def _place_block(
    ids,
    counts,
    order,
    offsets,
    places,
    slots_count,
    experts_count,
    blocks_count,
    SLOTS: tl.constexpr,
    BLOCKS_READ: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sort a block's slots by expert; an expert's first follows those of earlier blocks and lower experts."""
    block = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    counted = tl.zeros([BLOCKS_READ, WIDTH], tl.int32)
    earlier = tl.zeros([BLOCKS_READ, WIDTH], tl.int32)
    begin = 0
    while begin < blocks_count:
        blocks = begin + tl.arange(0, BLOCKS_READ)[:, None]
        some = tl.load(counts + blocks * WIDTH + experts[None, :], mask=blocks < blocks_count, other=0)
        counted += some
        earlier += tl.where(blocks < block, some, 0)
        begin += BLOCKS_READ
    totals = tl.sum(counted, axis=0)
    begins = tl.cumsum(totals) - totals
    if block == 0:
        tl.store(offsets + experts, begins, mask=experts <= experts_count)
    here = tl.load(counts + block * WIDTH + experts)
    # from a place in the block to one in all
    ahead = begins + tl.sum(earlier, axis=0) - (tl.cumsum(here) - here)
    within = tl.arange(0, SLOTS)
    keys = tl.sort(_experts_of(ids, block * SLOTS + within, slots_count, experts_count) * SLOTS + within)
    expert, slot = keys // SLOTS, block * SLOTS + keys % SLOTS
    place = within + tl.gather(ahead, expert, 0)
    tl.store(order + place, slot, mask=slot < slots_count)
    tl.store(places + slot, tl.where(expert < experts_count, place, -1), mask=slot < slots_count)
