"""The norm as V3 launches it."""

import torch

from kernels.ops.rms_norm_kernel import rms_norm_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16

SHIPPED = {
    f"rms_norm {size}": Shipped(lambda size=size: rms_norm_kernel(bfloat16(128, size), bfloat16(size), 1e-6))
    for size in (512, 1536, 7168)
}
SHIPPED["rms_norm float32"] = Shipped(
    lambda: rms_norm_kernel(torch.empty(4, 7168, device="meta"), bfloat16(7168), 1e-6)
)
