"""Queries as V3 turns them: the last 64 of the 192 numbers of each of 128 heads."""

from kernels.ops.rotary_kernel import rotate_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

TOKENS = 96


def turn(heads_count: int, interleaved: bool) -> None:
    """Turn the queries of a step."""
    queries = bfloat16(TOKENS, heads_count, 192)[..., 128:]
    rotate_kernel(queries, meta(TOKENS, 32), meta(TOKENS, 32), interleaved)


SHIPPED = {
    "rotary 128 heads": Shipped(lambda: turn(128, interleaved=True)),
    "rotary 128 heads halves": Shipped(lambda: turn(128, interleaved=False)),
    "rotary 16 heads": Shipped(lambda: turn(16, interleaved=True)),
}
