"""Plain products as V3 launches them: where tiles, parts of sums, or types differ."""

import torch

from kernels.ops.linear_kernel import linear_by_head_kernel, linear_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

MULTIPLIES = frozenset({"_multiply"})  # with one row too: weights are always the left side


def product(rows_count: int, in_count: int, out_count: int) -> Shipped:
    """One product of bfloat16, with WGMMA."""
    hidden, weight = bfloat16(rows_count, in_count), bfloat16(out_count, in_count)
    return Shipped(lambda: linear_kernel(hidden, weight), MULTIPLIES)


def product_by_head(rows_count: int, in_count: int, out_count: int, wide: int, heads: int = 128) -> Shipped:
    """One of 128 heads' products, of the first numbers of `wide`, with WGMMA."""
    hidden, weight = bfloat16(rows_count, heads, wide)[..., :in_count], bfloat16(heads, out_count, in_count)
    return Shipped(lambda: linear_by_head_kernel(hidden, weight), MULTIPLIES)


def scores(rows_count: int) -> Shipped:
    """The gate's logits, float32 from bfloat16, with WGMMA."""
    hidden, weight = bfloat16(rows_count, 7168), bfloat16(256, 7168)
    return Shipped(lambda: linear_kernel(hidden, weight, dtype=torch.float32), MULTIPLIES)


def wide_scores(rows_count: int) -> Shipped:
    """The logits of a model that computes in float32."""
    hidden, weight = meta(rows_count, 7168), meta(256, 7168)
    return Shipped(lambda: linear_kernel(hidden, weight))


def biased(rows_count: int) -> Shipped:
    """A product with a bias, with WGMMA."""
    hidden, weight, bias = bfloat16(rows_count, 7168), bfloat16(2112, 7168), bfloat16(2112)
    return Shipped(lambda: linear_kernel(hidden, weight, bias), MULTIPLIES)


SHIPPED = {
    **{
        f"{name} {rows_count}": product(rows_count, *sizes)
        for name, sizes, rows_counts in (
            ("query and latent down", (7168, 2112), (1, 64, 4096)),
            ("attention out", (16384, 7168), (32, 4096)),
            ("keys and values up", (512, 32768), (64, 4096)),
            ("vocabulary", (7168, 129280), (1, 128)),
        )
        for rows_count in rows_counts
    },
    "biased 1": biased(1),
    "biased 4096": biased(4096),
    "fold queries 1": product_by_head(1, 128, 512, 192),
    "fold queries 64": product_by_head(64, 128, 512, 192),
    "unfold values 128": product_by_head(128, 512, 128, 512),
    "gate 1": scores(1),
    "gate 64": scores(64),
    "gate 4096": scores(4096),
    "gate float32 1": wide_scores(1),
    "gate float32 64": wide_scores(64),
}
