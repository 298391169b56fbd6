"""Quantised rows as V3 launches them: the inputs of each FP8 product."""

from kernels.ops.quantize_kernel import quantize_rows_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16

SHIPPED = {
    f"quantize {size}": Shipped(lambda size=size: quantize_rows_kernel(bfloat16(128, size)))
    for size in (1536, 7168)
}
