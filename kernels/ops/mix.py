"""The outputs of a token's experts added by weight, in float32 and in the order of its choices."""

import numpy as np
import torch
from torch.nn import functional

from kernels.ops.compiled import compiled, runs_compiled


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
    if not runs_compiled(outputs):
        return mix_reference(outputs, weights, order)
    mixed = outputs.new_zeros(len(weights), outputs.shape[1])
    _add_slots(outputs.contiguous().numpy(), weights.contiguous().numpy(), order.numpy(), mixed.numpy())
    return mixed


@compiled("void(float32[:, ::1], float32[:, ::1], int64[::1], float32[:, ::1])")
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
