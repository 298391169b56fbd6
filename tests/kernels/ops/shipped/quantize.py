"""Quantised rows as V3 launches them, the inputs of each FP8 product: of any size the same code."""

from kernels.ops.quantize_kernel import quantize_rows_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16

SHIPPED = {"quantize 7168": Shipped(lambda: quantize_rows_kernel(bfloat16(128, 7168)))}
