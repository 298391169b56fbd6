"""The write into pages as V3 launches it: 576 numbers that end a row of 1536 + 576, pages in both formats."""

import torch

from kernels.ops.write_latents_kernel import write_latents_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

TOKENS = 96
SLOTS = 64 << 10


def write(latents: torch.Tensor) -> None:
    """Write the latents of a step."""
    down = bfloat16(TOKENS, 1536 + 576)[:, 1536:]
    turns = (meta(TOKENS, 32), meta(TOKENS, 32))
    slots = meta(TOKENS, dtype=torch.int64)
    write_latents_kernel(down, bfloat16(512), 1e-6, *turns, True, slots, latents)


SHIPPED = {
    "write_latents bfloat16": Shipped(lambda: write(bfloat16(SLOTS, 576))),
    "write_latents FP8": Shipped(lambda: write(meta(SLOTS, 656, dtype=torch.uint8))),
}
