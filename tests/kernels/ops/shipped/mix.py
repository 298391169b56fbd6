"""Mixing V3's eight outputs a token, of whatever number of tokens, with places at hand or only an order."""

import torch

from kernels.ops.mix_kernel import mix_kernel, places_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

SHIPPED = {
    "places": Shipped(lambda: places_kernel(meta(1024, dtype=torch.int64))),
    "bfloat16": Shipped(
        lambda: mix_kernel(bfloat16(1024, 7168), meta(128, 8), meta(1024, dtype=torch.int32))
    ),
    "float32": Shipped(lambda: mix_kernel(meta(1024, 7168), meta(128, 8), meta(1024, dtype=torch.int32))),
}
