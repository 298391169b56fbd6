"""FP8 products as V3 launches them: few rows and many, where their tiles or the sum's parts differ.

Gate and up of a shared expert, 7168 -> 4096, are the same code as 7168 -> 2112. With few rows other products
differ from those here in the number of steps alone.
"""

import torch

from kernels.ops.linear_fp8_kernel import linear_fp8_kernel
from tests.kernels.ops.shipping import Shipped, meta

MULTIPLIES = frozenset({"_multiply"})  # with few rows too: there the weights are the left side


def product(rows_count: int, in_count: int, out_count: int) -> Shipped:
    """One product, with WGMMA."""
    shapes = (rows_count, in_count), (out_count, in_count)
    hidden, weight = (meta(*shape, dtype=torch.float8_e4m3fn) for shape in shapes)
    hidden_scales = meta(rows_count, -(-in_count // 128))
    weight_scales = meta(-(-out_count // 128), -(-in_count // 128))
    return Shipped(
        lambda: linear_fp8_kernel(hidden, hidden_scales, weight, weight_scales, torch.bfloat16), MULTIPLIES
    )


SHIPPED = {
    f"{name} {rows_count}": product(rows_count, *sizes)
    for name, sizes, rows_counts in (
        ("query and latent down", (7168, 2112), (1, 128, 4096)),
        ("query up", (1536, 24576), (1, 32, 128, 4096)),
        ("attention out", (16384, 7168), (4096,)),
        ("dense gate and up", (7168, 36864), (4096,)),
        ("dense down", (18432, 7168), (4096,)),
        ("keys and values up", (512, 32768), (4096,)),
        ("shared experts' down", (2048, 7168), (1, 128, 4096)),
        ("ragged dense down of V2-Lite", (10944, 2048), (128,)),
    )
    for rows_count in rows_counts
}
