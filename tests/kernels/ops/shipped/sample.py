"""Sampling as V3 launches it: one row, and a full batch whose rows may have top-k and top-p or not."""

import torch

from kernels.ops.draw_kernel import ASKED, draw_kernel
from kernels.ops.sample_kernel import best_kernel
from tests.kernels.ops.shipping import Shipped, meta

VOCAB = 129_280


def draw(rows_count: int, ranks: bool) -> None:
    """One batch of draws."""
    token_ids = meta(rows_count, dtype=torch.int64)
    asked = meta(rows_count, len(ASKED), dtype=torch.float64)
    draw_kernel(meta(rows_count, VOCAB), meta(rows_count), token_ids, asked, ranks)


SHIPPED = {f"greedy {rows}": Shipped(lambda rows=rows: best_kernel(meta(rows, VOCAB))) for rows in (1, 128)}
SHIPPED |= {
    f"draw {rows}{' ranked' if ranks else ''}": Shipped(lambda rows=rows, ranks=ranks: draw(rows, ranks))
    for rows in (1, 128)
    for ranks in (False, True)
}
