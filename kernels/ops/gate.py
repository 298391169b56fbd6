"""Which experts a token goes to, and with what weight.

V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores; a bias steers the choice but not the weights; a group's
score is the sum of its two best. V2 (arXiv 2405.04434, section 2.1.2): softmax scores; a group's is its best.
"""

import numpy as np
import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import compiled, runs_compiled
from kernels.ops.gate_kernel import gate_greedy_kernel, gate_noaux_tc_kernel


def gate_noaux_tc(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    experts_per_token: int,
    groups_count: int,
    groups_per_token: int,
    normalised: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """V3's gate: `logits [tokens, experts]` float32 to weights float32 and ids int64, `[tokens, choices]`."""
    limits = (experts_per_token, groups_count, groups_per_token)
    if runs_kernel(logits):
        return gate_noaux_tc_kernel(logits, bias, *limits, normalised, scaling)
    if not runs_compiled(logits):
        return gate_noaux_tc_reference(logits, bias, *limits, normalised, scaling)
    ids = torch.empty(logits.shape[0], experts_per_token, dtype=torch.int64)
    weights = torch.empty(ids.shape, dtype=torch.float32)
    if logits.shape[1] % groups_count or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(f"logits {list(logits.shape)}, bias or {groups_count} groups do not fit each other")
    steering = np.zeros(logits.shape[1], np.float32) if bias is None else bias.float().numpy()
    _choose_all(
        logits.contiguous().numpy(), steering, groups_count, groups_per_token, weights.numpy(), ids.numpy()
    )
    if normalised:
        weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * scaling, ids


def gate_noaux_tc_reference(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    experts_per_token: int,
    groups_count: int,
    groups_per_token: int,
    normalised: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gate_noaux_tc` computes, in torch."""
    scores = sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if groups_count > 1:
        best_two = choice.unflatten(1, (groups_count, -1)).topk(2, dim=-1).values.sum(-1)
        choice = choice.masked_fill(~kept_experts(best_two, groups_per_token, choice.shape[1]), float("-inf"))
    ids = choice.topk(experts_per_token, dim=-1).indices
    weights = scores.gather(1, ids)
    if normalised:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scaling, ids


def gate_greedy(
    logits: torch.Tensor,
    experts_per_token: int,
    groups_count: int,
    groups_per_token: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """V2's gate, plain with one group and group-limited with more; shapes as in `gate_noaux_tc`."""
    if runs_kernel(logits):
        return gate_greedy_kernel(logits, experts_per_token, groups_count, groups_per_token, scaling)
    return gate_greedy_reference(logits, experts_per_token, groups_count, groups_per_token, scaling)


def gate_greedy_reference(
    logits: torch.Tensor,
    experts_per_token: int,
    groups_count: int,
    groups_per_token: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gate_greedy` computes, in torch."""
    choice = logits.softmax(dim=-1)
    if groups_count > 1:
        best = choice.unflatten(1, (groups_count, -1)).amax(dim=-1)
        choice = choice.masked_fill(~kept_experts(best, groups_per_token, choice.shape[1]), 0.0)
    weights, ids = choice.topk(experts_per_token, dim=-1)
    return weights * scaling, ids


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """`1 / (1 + exp(-logits))`, a row with the same bits in any batch.

    On CPU torch's own takes another path for the last numbers of a tensor, so that they change with its size.
    """
    return logits.neg().exp_().add_(1.0).reciprocal_()


def kept_experts(group_scores: torch.Tensor, groups_per_token: int, experts_count: int) -> torch.Tensor:
    """Mask `[tokens, experts]` of the experts in the best groups of `group_scores [tokens, groups]`."""
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, group_scores.topk(groups_per_token, dim=-1).indices, True)
    return kept.repeat_interleave(experts_count // group_scores.shape[1], dim=1)


@compiled()
def _take_greatest(numbers, places):
    """Where the greatest numbers are, greatest first; each is struck out once it is taken."""
    for taken in range(len(places)):
        best = 0
        for place in range(1, len(numbers)):
            if numbers[place] > numbers[best]:
                best = place
        places[taken] = best
        numbers[best] = -np.inf


@compiled()
def _sum_of_two_greatest(numbers):
    first = second = np.float32(-np.inf)
    for number in numbers:
        if number > first:
            first, second = number, first
        elif number > second:
            second = number
    return first + second


@compiled(
    "void(float32[:, ::1], float32[::1], intp, intp, float32[:, ::1], int64[:, ::1])", makes_arrays=True
)
def _choose_all(logits, bias, groups_count, groups_per_token, weights, ids):
    tokens_count, experts_count = logits.shape
    group_size = experts_count // groups_count
    scores = np.empty(experts_count, np.float32)
    choice = np.empty(experts_count, np.float32)
    best_two = np.empty(groups_count, np.float32)
    kept = np.empty(groups_per_token, np.int64)
    for token in range(tokens_count):
        is_number = True
        for expert in range(experts_count):
            scores[expert] = np.float32(1) / (np.float32(1) + np.exp(-logits[token, expert]))
            choice[expert] = scores[expert] + bias[expert]
            is_number = is_number and choice[expert] == choice[expert]
        if groups_count > 1:
            for group in range(groups_count):
                best_two[group] = _sum_of_two_greatest(choice[group * group_size : (group + 1) * group_size])
            _take_greatest(best_two, kept)
            for group in range(groups_count):
                if not np.any(kept == group):
                    choice[group * group_size : (group + 1) * group_size] = -np.inf
        _take_greatest(choice, ids[token])
        for place in range(ids.shape[1]):
            weights[token, place] = scores[ids[token, place]] if is_number else np.nan
