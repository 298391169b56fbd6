"""Grouping a step's slots by V3's 256 experts: up to 512 tokens by counting, 16,384 by sorting."""

import torch

from kernels.ops.group_by_expert_kernel import group_by_expert_kernel
from tests.kernels.ops.shipping import Shipped, meta

SHIPPED = {
    f"{tokens_count} tokens": Shipped(
        lambda tokens_count=tokens_count: group_by_expert_kernel(
            meta(tokens_count, 8, dtype=torch.int64), 256
        )
    )
    for tokens_count in (128, 512, 16_384)
}
