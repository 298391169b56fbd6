"""Products of tokens and the weights of their experts, tile by tile: the two halves of a SwiGLU.

One program multiplies some tokens of one expert by some rows of its weights (the output's columns), in steps
along the rows. Few tokens stand on the right of the product: a tensor core's left side has 64 rows at least,
which weights always fill. Each expert's weights are found by their address, so that experts may come and go
without moving others.

With FP8, a step is a block of 128 numbers, with one scale for each token and one for the weights' block: the
sum of a step is scaled and added in float32 outside of the tensor core, which would add with fewer bits.
"""

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import dot, to_dtype
from kernels.ops.quantize_kernel import quantize_tile

SCALED = tl.constexpr(128)  # numbers that share a scale
TILES_TOGETHER = tl.constexpr(16)  # of tokens, which read the same weights while those are in the cache
ADDRESSES = tl.constexpr(4)  # of an expert: gate and up, down, and the scales of either


@triton.jit(do_not_specialize=["experts_count"])
def gate_up_tile(
    hidden,
    hidden_scales,
    rows,
    bounds,
    addresses,
    out,
    out_scales,
    hidden_stride,
    experts_count,
    EXPERTS_WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):
    """`silu(gate) * up` of one tile, both from the same tokens; as FP8 and scales where the weights are."""
    blocks: tl.constexpr = (INTERMEDIATE + SCALED - 1) // SCALED
    steps: tl.constexpr = (HIDDEN + STEP - 1) // STEP
    expert, begin, places, there, block = _find_tile(
        bounds, experts_count, EXPERTS_WIDTH, CAPACITY, TOKENS, (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    )
    if expert == experts_count:
        return
    slots = begin + places
    tokens = slots
    if not CAPACITY:
        tokens = tl.load(rows + slots, mask=there, other=0).to(tl.int64)
    along = tl.arange(0, STEP)
    token_pointers = hidden + tokens[:, None] * hidden_stride + along[None, :]
    weights = _weights_at(addresses + expert * ADDRESSES, hidden) + block * COLUMNS * HIDDEN
    offsets = _weight_offsets(block, along, INTERMEDIATE, COLUMNS, HIDDEN)

    shape: tl.constexpr = [COLUMNS, TOKENS] if WEIGHTS_LEFT else [TOKENS, COLUMNS]
    gate = tl.zeros(shape, tl.float32)
    up = tl.zeros(shape, tl.float32)
    is_scaled: tl.constexpr = hidden_scales is not None
    if is_scaled:
        token_scales = hidden_scales + tokens * steps
        gate_scales = tl.load(addresses + expert * ADDRESSES + 2).to(hidden_scales.dtype)
        gate_scales += block * COLUMNS // SCALED * steps
        token_next = tl.load(token_scales, mask=there, other=0.0)
        gate_next = tl.load(gate_scales)
        up_next = tl.load(gate_scales + blocks * steps)
    for step in range(steps):
        inside = step * STEP + along < HIDDEN
        token = _load_tokens(token_pointers + step * STEP, there, inside, HIDDEN, STEP)
        gate_weight = _load_weights(weights + step * STEP + offsets, inside, HIDDEN, STEP)
        up_weight = _load_weights(
            weights + (INTERMEDIATE * HIDDEN + step * STEP) + offsets, inside, HIDDEN, STEP
        )
        gate_by, up_by = None, None
        if is_scaled:
            gate_by, up_by = token_next * gate_next, token_next * up_next
            after = tl.minimum(step + 1, steps - 1)  # asked for early: these loads are not pipelined
            token_next = tl.load(token_scales + after, mask=there, other=0.0)
            gate_next = tl.load(gate_scales + after)
            up_next = tl.load(gate_scales + blocks * steps + after)
        gate = _add(gate, token, gate_weight, gate_by, WEIGHTS_LEFT)
        up = _add(up, token, up_weight, up_by, WEIGHTS_LEFT)
    product = gate * tl.sigmoid(gate) * up
    _store(out, out_scales, product, slots, there, block, INTERMEDIATE, COLUMNS, WEIGHTS_LEFT)


@triton.jit(do_not_specialize=["experts_count"])
def down_tile(
    inner,
    inner_scales,
    bounds,
    addresses,
    out,
    experts_count,
    EXPERTS_WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):
    """One tile of `out [slots, hidden]`, from `inner [slots, intermediate]`, whose slots are the same."""
    steps: tl.constexpr = (INTERMEDIATE + STEP - 1) // STEP
    expert, begin, places, there, block = _find_tile(
        bounds, experts_count, EXPERTS_WIDTH, CAPACITY, TOKENS, (HIDDEN + COLUMNS - 1) // COLUMNS
    )
    if expert == experts_count:
        return
    slots = begin + places
    along = tl.arange(0, STEP)
    token_pointers = inner + slots[:, None] * INTERMEDIATE + along[None, :]
    weights = _weights_at(addresses + expert * ADDRESSES + 1, inner) + block * COLUMNS * INTERMEDIATE
    offsets = _weight_offsets(block, along, HIDDEN, COLUMNS, INTERMEDIATE)

    total = tl.zeros([COLUMNS, TOKENS] if WEIGHTS_LEFT else [TOKENS, COLUMNS], tl.float32)
    is_scaled: tl.constexpr = inner_scales is not None
    if is_scaled:
        token_scales = inner_scales + slots * steps
        scales = tl.load(addresses + expert * ADDRESSES + 3).to(inner_scales.dtype)
        scales += block * COLUMNS // SCALED * steps
        token_next = tl.load(token_scales, mask=there, other=0.0)
        weight_next = tl.load(scales)
    for step in range(steps):
        inside = step * STEP + along < INTERMEDIATE
        token = _load_tokens(token_pointers + step * STEP, there, inside, INTERMEDIATE, STEP)
        weight = _load_weights(weights + step * STEP + offsets, inside, INTERMEDIATE, STEP)
        by = None
        if is_scaled:
            by = token_next * weight_next
            after = tl.minimum(step + 1, steps - 1)
            token_next = tl.load(token_scales + after, mask=there, other=0.0)
            weight_next = tl.load(scales + after)
        total = _add(total, token, weight, by, WEIGHTS_LEFT)
    _store(out, None, total, slots, there, block, HIDDEN, COLUMNS, WEIGHTS_LEFT)


@triton.jit
def _weights_at(address, like):
    """What an address in memory leads to, as a pointer to such numbers as `like` leads to."""
    # Said where the pointer is made: a hint to what a function returns is lost when that is inlined, and
    # Triton 3.6 forgets one to the address. Without it numbers would be loaded one by one.
    return tl.multiple_of(tl.load(address).to(like.dtype), 16)


@triton.jit
def _find_tile(
    bounds,
    experts_count,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What this program is for: expert, its first slot, places of tokens after that, which of them are there,
    block of columns. Programs are sorted by expert; for those beyond the last tile, expert is experts_count.
    """
    program = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    inside = experts < experts_count
    counts = tl.load(bounds + experts + (0 if CAPACITY else 1), mask=inside, other=0)
    if not CAPACITY:
        counts -= tl.load(bounds + experts, mask=inside, other=0)
    ends = tl.cumsum((counts + TOKENS - 1) // TOKENS, 0)
    is_before = (ends <= program // BLOCKS) & inside
    expert = tl.sum(is_before.to(tl.int32), 0)
    program -= tl.max(tl.where(is_before, ends, 0), 0) * BLOCKS
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    if CAPACITY:
        begin = expert.to(tl.int64) * CAPACITY
    else:
        begin = tl.load(bounds + tl.minimum(expert, experts_count - 1)).to(tl.int64)
    # Tiles of tokens go fastest, some together, then blocks of columns: so weights are read once.
    first = program // (TILES_TOGETHER * BLOCKS) * TILES_TOGETHER
    together = tl.minimum((count + TOKENS - 1) // TOKENS - first, TILES_TOGETHER)
    together = tl.maximum(together, 1)  # for programs without a tile
    program -= first * BLOCKS
    places = (first + program % together) * TOKENS + tl.arange(0, TOKENS)
    return expert, begin, places, places < count, program // together


@triton.jit
def _weight_offsets(block, along, SIZE: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Where a step's numbers of a block of lines are, after the first; beyond SIZE, the last line's."""
    lines = tl.arange(0, COLUMNS)
    if SIZE % COLUMNS:
        lines = tl.minimum(lines, SIZE - 1 - block * COLUMNS)
    return lines[:, None] * WIDE + along[None, :]


@triton.jit
def _load_tokens(pointers, there, inside, SIZE: tl.constexpr, STEP: tl.constexpr):
    if SIZE % STEP:
        return tl.load(pointers, mask=there[:, None] & inside[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=there[:, None], other=0.0)


@triton.jit
def _load_weights(pointers, inside, SIZE: tl.constexpr, STEP: tl.constexpr):
    if SIZE % STEP:
        return tl.load(pointers, mask=inside[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _add(total, token, weight, by, WEIGHTS_LEFT: tl.constexpr):
    """`total` and the products of one step, those of each token times `by [tokens]` if that is given."""
    if WEIGHTS_LEFT:
        left = weight
        right = tl.trans(token)
    else:
        left = token
        right = tl.trans(weight)
    if by is None:
        return dot(left, right, total)
    else:
        product = dot(left, right, tl.zeros(total.shape, tl.float32))
        return total + product * (by[None, :] if WEIGHTS_LEFT else by[:, None])


@triton.jit
def _store(
    out,
    out_scales,
    numbers,
    slots,
    there,
    block,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):
    """Write a tile of `out [slots, SIZE]`, as FP8 if there are scales to write as well."""
    if WEIGHTS_LEFT:
        numbers = tl.trans(numbers)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = there[:, None] & (columns < SIZE)[None, :]
    pointers = out + slots[:, None] * SIZE + columns[None, :]
    if out_scales is None:
        tl.store(pointers, to_dtype(numbers, out.dtype.element_ty), mask=inside)
    else:
        narrow, scales = quantize_tile(numbers)  # columns beyond the last are copies of it: no larger
        tl.store(pointers, narrow, mask=inside)
        tl.store(out_scales + slots * ((SIZE + SCALED - 1) // SCALED) + block, scales, mask=there)
