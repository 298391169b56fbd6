"""Which experts a token goes to, and with what weight.

V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores; a bias steers the choice but not the weights; a group's
score is the sum of its two best. V2 (arXiv 2405.04434, section 2.1.2): softmax scores; a group's is its best.
"""

import torch


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
