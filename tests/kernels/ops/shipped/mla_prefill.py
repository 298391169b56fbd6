"""Attention of prompts and its merge as V3 launches them, and with the 16 heads of V2-Lite."""

import torch

from kernels.ops.merge_attention_kernel import merge_attention_kernel
from kernels.ops.mla_prefill_kernel import mla_prefill_ragged_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

CONTENT, ROTARY, VALUE = 128, 64, 128
QUERY_TOKENS, KEY_TOKENS, REQUESTS = 512, 4096, 4


def attend(heads_count: int, causal: bool) -> None:
    """A chunk over its own keys, or over a piece of what is cached."""
    unfolded = bfloat16(KEY_TOKENS, heads_count, CONTENT + VALUE)
    starts = meta(REQUESTS + 1, dtype=torch.int32)
    mla_prefill_ragged_kernel(
        bfloat16(QUERY_TOKENS, heads_count, CONTENT + ROTARY),
        unfolded[..., :CONTENT],
        bfloat16(KEY_TOKENS, ROTARY),
        unfolded[..., CONTENT:],
        starts,
        starts,
        0.1,
        causal,
        QUERY_TOKENS,
    )


SHIPPED = {
    f"mla_prefill {heads_count} {'causal' if causal else 'piece'}": Shipped(
        lambda heads_count=heads_count, causal=causal: attend(heads_count, causal),
        wgmma=frozenset({"_attend_tile"}),
    )
    for heads_count, causal in ((128, True), (128, False), (16, True))
}
SHIPPED["mla_prefill merge"] = Shipped(
    lambda: merge_attention_kernel(
        *(bfloat16(QUERY_TOKENS, 128, VALUE), meta(QUERY_TOKENS, 128)) * 2, in_place=True
    )
)
