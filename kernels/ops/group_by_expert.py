"""Slots (a token's choices of experts, one after the other) in the order of their experts, on their device.

`sort_by_expert` tells a CPU which experts are present; here nothing is told to the host, so that a step whose
experts are on a GPU need not wait for it.
"""

import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.group_by_expert_kernel import group_by_expert_kernel


def group_by_expert(
    expert_ids: torch.Tensor, experts_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stable order of the slots of `expert_ids [tokens, choices]`, each expert's begin, and their places.

    `order [slots]`, `offsets [experts + 1]` and `places [slots]` are int32: expert e has the slots
    `order[offsets[e]:offsets[e + 1]]`, and slot s stands at `places[s]` of the order. An id outside of
    `0..experts_count - 1` is nobody's: its slot comes after all others and has the place -1.
    """
    if runs_kernel(expert_ids):
        return group_by_expert_kernel(expert_ids, experts_count)
    return group_by_expert_reference(expert_ids, experts_count)


def group_by_expert_reference(
    expert_ids: torch.Tensor, experts_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `group_by_expert` computes, in torch."""
    experts = expert_ids.reshape(-1).long()
    experts = experts.where((experts >= 0) & (experts < experts_count), experts_count)
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=experts_count + 1)[:experts_count]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    places = places.where(experts < experts_count, -1)
    return order.int(), offsets.int(), places.int()
