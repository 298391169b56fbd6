"""The outputs of a token's experts added by weight, in float32 and in the order of its choices."""

import numpy as np
import torch
from torch.nn import functional

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import compiled, runs_compiled
from kernels.ops.mix_kernel import mix_kernel, places_kernel


def mix_reference(outputs: torch.Tensor, weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What `mix` computes, in torch."""
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    places = places.view(weights.shape)
    return functional.embedding_bag(places, outputs.float(), mode="sum", per_sample_weights=weights)


def mix(outputs: torch.Tensor, weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Sum of `outputs [tokens * choices, hidden]` by `weights [tokens, choices]`, `[tokens, hidden]` float32.

    Output i is that of slot `order[i]`; token t's slots are `t * choices` and those after it.
    """
    if not len(outputs) == len(order) == weights.numel():
        raise ValueError(f"{len(outputs)} outputs do not fit weights of {list(weights.shape)}")
    if runs_kernel(outputs):
        return mix_kernel(outputs, weights, places_kernel(order))
    if not runs_compiled(outputs):
        return mix_reference(outputs, weights, order)
    mixed = outputs.new_zeros(len(weights), outputs.shape[1])
    _add_slots(outputs.contiguous().numpy(), weights.contiguous().numpy(), order.numpy(), mixed.numpy())
    return mixed


def mix_placed_reference(outputs: torch.Tensor, weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What `mix_placed` computes, in torch."""
    places = places.view(weights.shape).long()
    padded = functional.pad(outputs.float(), (0, 0, 0, 1))  # by a row of zeros, which -1 leads to
    weights = weights.where(places >= 0, 0.0)
    return functional.embedding_bag(places % len(padded), padded, mode="sum", per_sample_weights=weights)


def mix_placed(outputs: torch.Tensor, weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """As `mix`, where slot s has the output `places[s]`, int32 as `group_by_expert` tells them.

    A slot whose place is -1 adds nothing, whatever its weight; `outputs` may have rows that no slot has.
    """
    if places.numel() != weights.numel():
        raise ValueError(f"{places.numel()} places do not fit weights of {list(weights.shape)}")
    if runs_kernel(outputs):
        return mix_kernel(outputs, weights, places)
    return mix_placed_reference(outputs, weights, places)


@compiled("void(float32[:, ::1], float32[:, ::1], int64[::1], float32[:, ::1])", makes_arrays=True)
def _add_slots(outputs, weights, order, mixed):
    tokens_count, choices_count = weights.shape
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    for token in range(tokens_count):
        row = mixed[token]
        for choice in range(choices_count):
            output, weight = outputs[places[token * choices_count + choice]], weights[token, choice]
            for column in range(len(row)):
                row[column] += weight * output[column]
