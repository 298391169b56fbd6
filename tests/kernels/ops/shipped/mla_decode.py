"""Absorbed attention as V3 (128 heads) and V2-Lite (16 heads) launch it.

For the 64 heads of Kimi K2, and where all is one split, it is the code of V3.
"""

import torch

from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.mla_decode_kernel import mla_decode_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

REQUESTS_COUNT, PAGES_COUNT, PAGE_TOKENS = 4, 1024, 64
VALUE, POSITION = 512, 64
LATENTS = bfloat16(PAGES_COUNT, PAGE_TOKENS, VALUE + POSITION)
PACKED = meta(PAGES_COUNT, PAGE_TOKENS, packed_bytes(VALUE, POSITION), dtype=torch.uint8)


def launch(latents: torch.Tensor, heads_count: int) -> torch.Tensor:
    """Attention of some requests, split and merged."""
    queries = bfloat16(REQUESTS_COUNT, heads_count, VALUE + POSITION)
    pages = meta(REQUESTS_COUNT, PAGES_COUNT // REQUESTS_COUNT, dtype=torch.int32)
    lengths = meta(REQUESTS_COUNT, dtype=torch.int32)
    return mla_decode_kernel(queries, latents, pages, lengths, VALUE, 0.1)


WGMMA = frozenset({"_attend_split"})
SHIPPED = {
    "mla_decode 128 heads": Shipped(lambda: launch(LATENTS, 128), WGMMA),
    "mla_decode 16 heads": Shipped(lambda: launch(LATENTS, 16)),
    "mla_decode 128 heads, FP8": Shipped(lambda: launch(PACKED, 128), WGMMA),
    "mla_decode 16 heads, FP8": Shipped(lambda: launch(PACKED, 16)),
}
