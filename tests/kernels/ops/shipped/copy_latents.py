"""Latents of V3 from pages to a buffer and back, in all 61 layers or, as a prompt sends them, in one."""

import torch

from kernels.ops.copy_latents_kernel import gather_latents_kernel, scatter_latents_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

LAYERS = 61
TOKENS = 1024
SLOTS = 64 << 10
VALUE_DIM = 512


def packed(*shape: int) -> torch.Tensor:
    """Latents in FP8 without memory."""
    return meta(*shape, 656, dtype=torch.uint8)


def numbers(*shape: int) -> torch.Tensor:
    """Latents in bfloat16 without memory."""
    return bfloat16(*shape, 576)


def gather(latents: torch.Tensor, out: torch.Tensor) -> None:
    """Make one buffer of a prompt's latents."""
    gather_latents_kernel(latents, meta(TOKENS, dtype=torch.int64), out, VALUE_DIM)


def scatter(rows: torch.Tensor, latents: torch.Tensor) -> None:
    """Put one buffer into pages."""
    scatter_latents_kernel(rows, meta(TOKENS, dtype=torch.int64), latents, VALUE_DIM)


SHIPPED = {
    "gather bfloat16": Shipped(lambda: gather(numbers(LAYERS, SLOTS), numbers(LAYERS, TOKENS))),
    "gather bfloat16 one layer": Shipped(lambda: gather(numbers(SLOTS), numbers(TOKENS))),
    "gather FP8": Shipped(lambda: gather(packed(LAYERS, SLOTS), packed(LAYERS, TOKENS))),
    "gather bfloat16 to FP8": Shipped(lambda: gather(numbers(LAYERS, SLOTS), packed(LAYERS, TOKENS))),
    "gather FP8 to bfloat16": Shipped(lambda: gather(packed(SLOTS), numbers(TOKENS))),
    "scatter FP8": Shipped(lambda: scatter(packed(LAYERS, TOKENS), packed(LAYERS, SLOTS))),
    "scatter bfloat16 to FP8": Shipped(lambda: scatter(numbers(LAYERS, TOKENS), packed(LAYERS, SLOTS))),
}
