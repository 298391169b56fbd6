"""Attention of prompts and its merge as V3 launches them: with any number of heads the same code."""

import torch

from kernels.ops.merge_attention_kernel import merge_attention_kernel
from kernels.ops.mla_prefill_kernel import mla_prefill_ragged_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

HEADS, CONTENT, ROTARY, VALUE = 128, 128, 64, 128
QUERY_TOKENS, KEY_TOKENS, REQUESTS = 512, 4096, 4


def attend(causal: bool) -> None:
    """A chunk over its own keys, or over a piece of what is cached."""
    unfolded = bfloat16(KEY_TOKENS, HEADS, CONTENT + VALUE)
    starts = meta(REQUESTS + 1, dtype=torch.int32)
    mla_prefill_ragged_kernel(
        bfloat16(QUERY_TOKENS, HEADS, CONTENT + ROTARY),
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
    f"mla_prefill {'causal' if causal else 'piece'}": Shipped(
        lambda causal=causal: attend(causal), wgmma=frozenset({"_attend_tile"})
    )
    for causal in (True, False)
}
SHIPPED["mla_prefill merge"] = Shipped(
    lambda: merge_attention_kernel(
        *(bfloat16(QUERY_TOKENS, HEADS, VALUE), meta(QUERY_TOKENS, HEADS)) * 2, in_place=True
    ),
    barriers=frozenset({"_merge_rows"}),
)
