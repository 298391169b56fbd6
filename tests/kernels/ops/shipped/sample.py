"""Sampling as V3 launches it, the same code for any number of rows, which may have top-k and top-p or not."""

import torch

from kernels.ops.draw_kernel import ASKED, draw_kernel
from kernels.ops.sample_kernel import best_kernel
from tests.kernels.ops.shipping import Shipped, meta

ROWS, VOCAB = 128, 129_280


def draw(ranks: bool) -> None:
    """One batch of draws."""
    token_ids, asked = meta(ROWS, dtype=torch.int64), meta(ROWS, len(ASKED), dtype=torch.float64)
    draw_kernel(meta(ROWS, VOCAB), meta(ROWS), token_ids, asked, ranks)


SHIPPED = {
    "greedy": Shipped(lambda: best_kernel(meta(ROWS, VOCAB))),
    "draw": Shipped(lambda: draw(ranks=False)),
    "draw ranked": Shipped(lambda: draw(ranks=True)),
}
