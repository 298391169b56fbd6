"""The gates on a GPU: one warp a token, whose scores stay in registers from the logits to the choices.

Scores are compared as integers in the same order, which a warp reduces in one instruction; of equal ones the
lowest id wins, as on a CPU.
"""

import torch

from kernels.ops.backend import tl, triton

TAKEN = tl.constexpr(-(2**31))  # below the integer of every number


def gate_noaux_tc_kernel(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    experts_per_token: int,
    groups_count: int,
    groups_per_token: int,
    normalised: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gate_noaux_tc`, in one launch; rows of logits may be strided."""
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"a bias of {list(bias.shape)} does not fit logits of {list(logits.shape)}")
    limits = (experts_per_token, groups_count, groups_per_token)
    return _launch(logits, bias, *limits, scaling, is_softmax=False, normalised=normalised)


def gate_greedy_kernel(
    logits: torch.Tensor,
    experts_per_token: int,
    groups_count: int,
    groups_per_token: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gate_greedy`, in one launch; rows of logits may be strided."""
    limits = (experts_per_token, groups_count, groups_per_token)
    return _launch(logits, None, *limits, scaling, is_softmax=True, normalised=False)


def _launch(
    logits, bias, choices_count, groups_count, groups_kept, scaling, is_softmax, normalised
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_count, experts_count = logits.shape
    size = experts_count // groups_count
    if experts_count % groups_count or choices_count > groups_kept * size:
        raise ValueError(
            f"{choices_count} choices of {experts_count} experts in {groups_kept} of {groups_count} groups:"
            " groups must be equal and those kept must hold the choices"
        )
    weights = torch.empty(tokens_count, choices_count, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens_count, choices_count, dtype=torch.int64, device=logits.device)
    _choose_experts[(tokens_count,)](
        logits,
        logits if bias is None else bias,
        weights,
        ids,
        *logits.stride(),
        scaling,
        groups_count,
        size,
        groups_kept,
        choices_count,
        triton.next_power_of_2(groups_count),
        triton.next_power_of_2(size),
        triton.next_power_of_2(choices_count),
        bias is not None,
        is_softmax,
        normalised,
        num_warps=1,
    )
    return weights, ids


@triton.jit
def _choose_experts(
    logits,
    bias,
    weights,
    ids,
    row_stride,
    column_stride,
    scaling,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHOICES_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    groups = tl.arange(0, GROUPS_WIDTH)[:, None]
    members = tl.arange(0, WIDTH)[None, :]
    experts = groups * SIZE + members
    inside = (groups < GROUPS) & (members < SIZE)
    numbers = tl.load(row + experts * column_stride, mask=inside, other=-float("inf")).to(tl.float32)
    greatest, total = 0.0, 1.0
    if IS_SOFTMAX:
        greatest = tl.max(numbers)
        total = tl.sum(tl.exp(numbers - greatest))
    choice = _score(numbers, greatest, total, IS_SOFTMAX)
    if HAS_BIAS:
        choice += tl.load(bias + experts, mask=inside, other=0.0).to(tl.float32)
    is_number = tl.max((choice != choice).to(tl.int32)) == 0
    choice = tl.where(inside & (choice == choice), choice, -float("inf"))
    keys = tl.where(inside, _key(choice), TAKEN)
    if GROUPS > 1:
        kept = _kept_groups(choice, GROUPS_KEPT, GROUPS_WIDTH, IS_SOFTMAX)
        keys = tl.where(kept[:, None], keys, TAKEN)
    choices = tl.arange(0, CHOICES_WIDTH)
    chosen = _take_greatest(tl.reshape(keys, [GROUPS_WIDTH * WIDTH]), choices, CHOICES)
    chosen = chosen // WIDTH * SIZE + chosen % WIDTH
    taken = choices < CHOICES
    # The logits of the chosen are read again: that is a hit in the cache, where to find them is a reduction.
    numbers = tl.load(row + chosen * column_stride, mask=taken, other=-float("inf")).to(tl.float32)
    by = tl.where(taken, _score(numbers, greatest, total, IS_SOFTMAX), 0.0)
    if NORMALISED:
        by = by / (tl.sum(by) + 1e-20)
    by = tl.where(is_number, by * scaling, float("nan"))
    tl.store(weights + token * CHOICES + choices, by, mask=taken)
    tl.store(ids + token * CHOICES + choices, chosen.to(tl.int64), mask=taken)


@triton.jit
def _score(numbers, greatest, total, IS_SOFTMAX: tl.constexpr):
    """The scores of some logits of a row; the greatest and the total are those of a softmax."""
    if IS_SOFTMAX:
        return tl.exp(numbers - greatest) / total
    else:
        return 1.0 / (1.0 + tl.exp(-numbers))


@triton.jit
def _key(numbers):
    """int32 in the order of float32."""
    bits = numbers.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(keys):
    """What `_key` was made of: it is its own inverse."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kept_groups(choice, GROUPS_KEPT: tl.constexpr, GROUPS_WIDTH: tl.constexpr, BY_BEST: tl.constexpr):
    """Which groups `[groups]` have fewer than `GROUPS_KEPT` before them."""
    keys = _key(choice)
    best = tl.max(keys, axis=1)
    if not BY_BEST:
        is_best = keys == best[:, None]
        second = tl.max(tl.where(is_best, TAKEN, keys), axis=1)
        second = tl.where(tl.sum(is_best.to(tl.int32), axis=1) > 1, best, second)
        best = _key(_number(best) + _number(second))
    groups = tl.arange(0, GROUPS_WIDTH)
    mine, other = best[:, None], best[None, :]
    before = (other > mine) | ((other == mine) & (groups[None, :] < groups[:, None]))
    return tl.sum(before.to(tl.int32), axis=1) < GROUPS_KEPT


@triton.jit
def _take_greatest(keys, choices, CHOICES: tl.constexpr):
    """Where the greatest keys are, greatest first, by `choices`; of equal ones the first."""
    places = tl.arange(0, keys.shape[0])
    chosen = tl.zeros_like(choices)
    for choice in tl.static_range(CHOICES):
        place = tl.min(tl.where(keys == tl.max(keys), places, keys.shape[0]))
        keys = tl.where(places == place, TAKEN, keys)
        chosen = tl.where(choices == choice, place, chosen)
    return chosen
