"""The norms as V3 launches them, and V2-Lite with its 2048."""

from kernels.ops.rms_norm_kernel import (
    add_rms_norm_kernel,
    add_rms_norm_quantize_kernel,
    rms_norm_kernel,
    rms_norm_quantize_kernel,
)
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

EPS = 1e-6
ROWS, WEIGHT = bfloat16(128, 7168), bfloat16(7168)

SHIPPED = {
    f"rms_norm {size}": Shipped(lambda size=size: rms_norm_kernel(bfloat16(128, size), bfloat16(size), EPS))
    for size in (512, 1536, 2048, 7168)
} | {
    "rms_norm float32": Shipped(lambda: rms_norm_kernel(meta(4, 7168), WEIGHT, EPS)),
    "rms_norm_quantize": Shipped(lambda: rms_norm_quantize_kernel(ROWS, WEIGHT, EPS)),
    "rms_norm_quantize 1536": Shipped(
        lambda: rms_norm_quantize_kernel(bfloat16(128, 1536), bfloat16(1536), EPS)
    ),
    "add_rms_norm": Shipped(lambda: add_rms_norm_kernel(ROWS, bfloat16(128, 7168), WEIGHT, EPS)),
    "add_rms_norm_quantize": Shipped(
        lambda: add_rms_norm_quantize_kernel(ROWS, bfloat16(128, 7168), WEIGHT, EPS)
    ),
}
