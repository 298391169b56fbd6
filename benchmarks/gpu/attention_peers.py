"""Attention as others compute it: FlashMLA, FlashInfer, FlashAttention 3, Triton kernels of vLLM and SGLang.

Each function here takes a case's inputs, makes what its peer needs besides, and gives what is then timed:
plans and changes of layout are not, nor a whole key put together of its two parts. Calls follow vLLM 0.23,
FlashInfer 0.6.6, FlashMLA and FlashAttention of 2026, SGLang 0.5; where another version differs, the failure
is told beside the others' times.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks.gpu.case import Run, first
from benchmarks.gpu.peers import module_of, operations_of
from kernels.ops.latent_format import unpack_latents_reference

WORKSPACE_BYTES = 256 << 20
VLLM_SPLITS, SGLANG_SPLITS = 4, 16
UNPACKED_TOKENS_MAX = 1 << 20


class DecodeInputs(NamedTuple):
    """The arguments of `mla_decode`."""

    queries: torch.Tensor
    latents: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    value_dim: int
    scale: float


class PrefillInputs(NamedTuple):
    """A prompt, whole."""

    queries: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    scale: float

    def whole_keys(self) -> torch.Tensor:
        """Keys with their positions `[tokens, heads, content + rotary]`."""
        positions = self.positions.unsqueeze(1).expand(-1, self.keys.shape[1], -1)
        return torch.cat([self.keys, positions], dim=-1)


def decode_peers(inputs: DecodeInputs) -> dict[str, Callable[[], Run]]:
    """Those that are there for latents of this format."""
    flash_mla = operations_of("_flashmla_C", "dense_decode_fwd")
    if inputs.latents.dtype == torch.uint8:
        sparse = operations_of("_flashmla_C", "sparse_decode_fwd")
        peers = {"FlashMLA, all tokens chosen": (sparse, lambda: flash_mla_sparse(inputs))}
        small = inputs.pages.numel() * inputs.latents.shape[1] <= UNPACKED_TOKENS_MAX
        peers["torch"] = (small, lambda: torch_decode(inputs))
    else:
        infer, three = module_of("FlashInfer"), fa3_function()
        peers = {
            "FlashMLA": (flash_mla, lambda: flash_mla_dense(inputs)),
            "flash_mla": (module_of("FlashMLA"), lambda: flash_mla_package(inputs)),
            "FlashInfer": (infer, lambda: flashinfer_decode(inputs, infer)),
            "FlashAttention 3": (three, lambda: fa3_decode(inputs)),
            "vLLM Triton": (module_of("vLLM Triton"), lambda: vllm_triton(inputs)),
            "SGLang Triton": (module_of("SGLang Triton"), lambda: sglang_triton(inputs)),
            "torch": (True, lambda: torch_decode(inputs)),
        }
        if flash_mla is not None:
            del peers["flash_mla"]
    return {name: ready for name, (there, ready) in peers.items() if there}


def torch_decode(inputs: DecodeInputs) -> Run:
    """Gather the pages, two batched products, a softmax between them."""
    queries, latents, pages, _, value_dim, scale = inputs
    at = pages.long()
    length = int(inputs.lengths[0])

    def run() -> torch.Tensor:
        context = latents[at].flatten(1, 2)[:, :length]
        if context.dtype == torch.uint8:
            unpacked = unpack_latents_reference(context.flatten(0, 1), value_dim, queries.dtype)
            context = unpacked.unflatten(0, (len(at), -1))
        weights = ((queries @ context.mT).float() * scale).softmax(dim=-1)
        return weights.to(queries.dtype) @ context[..., :value_dim]

    return run


def flash_mla_dense(inputs: DecodeInputs) -> Run:
    """FlashMLA's operation for bfloat16 latents; how it splits the contexts is planned once."""
    attend = torch.ops._flashmla_C.dense_decode_fwd
    queries, cache = inputs.queries.unsqueeze(1), inputs.latents.unsqueeze(2)
    given = (queries, cache, inputs.value_dim, inputs.lengths, inputs.pages, inputs.scale, False)
    plan = attend(*given, None, None)[2:]
    return lambda: attend(*given, *plan)[0].squeeze(1)


def flash_mla_sparse(inputs: DecodeInputs) -> Run:
    """FlashMLA reads this FP8 layout in its kernel for chosen tokens alone: here all are chosen."""
    attend = torch.ops._flashmla_C.sparse_decode_fwd
    queries, cache = inputs.queries.unsqueeze(1), inputs.latents.unsqueeze(2)
    slots = slots_of(inputs).view(len(inputs.pages), 1, -1).int()
    before = (queries, cache, slots, None, None)
    after = (None, None, None, inputs.value_dim, inputs.scale)
    plan = attend(*before, None, None, *after)[2:]
    return lambda: attend(*before, *plan, *after)[0].squeeze(1)


def flash_mla_package(inputs: DecodeInputs) -> Run:
    """FlashMLA as a package; older ones take lengths to plan from, newer ones plan by themselves."""
    library = module_of("FlashMLA")
    queries, cache = inputs.queries.unsqueeze(1), inputs.latents.unsqueeze(2)
    plan = library.get_mla_metadata(inputs.lengths, queries.shape[2], 1)
    given = (queries, cache, inputs.pages, inputs.lengths, inputs.value_dim, *plan)
    return lambda: library.flash_mla_with_kvcache(*given, softmax_scale=inputs.scale)[0].squeeze(1)


def flashinfer_decode(inputs: DecodeInputs, library: ModuleType) -> Run:
    """Its wrapper for absorbed attention."""
    queries, latents, pages, lengths, value_dim, scale = inputs
    device, requests = queries.device, len(lengths)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = library.mla.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    query_starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
    page_starts = query_starts * pages.shape[1]
    sizes = (queries.shape[1], value_dim, queries.shape[2] - value_dim, latents.shape[1])
    asked = (False, scale, queries.dtype, latents.dtype)
    wrapper.plan(query_starts, page_starts, pages.flatten(), lengths, *sizes, *asked)
    parts = (
        queries[..., :value_dim],
        queries[..., value_dim:],
        latents[..., :value_dim],
        latents[..., value_dim:],
    )
    return lambda: wrapper.run(*parts, return_lse=False)


def vllm_triton(inputs: DecodeInputs) -> Run:
    """vLLM's kernel, with the four splits that it always takes."""
    attend = module_of("vLLM Triton").decode_attention_fwd
    queries, latents, pages, lengths, value_dim, scale = inputs
    keys = latents.unsqueeze(2)
    out = queries.new_empty(*queries.shape[:2], value_dim)
    sums = torch.empty(queries.shape[:2], dtype=torch.float32, device=queries.device)
    means = sums.new_empty(*queries.shape[:2], VLLM_SPLITS, value_dim + 1)
    before = (queries, keys, keys[..., :value_dim], out, sums, pages, lengths, means, VLLM_SPLITS, scale)

    def run() -> torch.Tensor:
        attend(*before, page_size=latents.shape[1])
        return out

    return run


def sglang_triton(inputs: DecodeInputs) -> Run:
    """SGLang's kernel over slots of single tokens, with up to 16 splits."""
    attend = module_of("SGLang Triton").decode_attention_fwd
    queries, latents, _, lengths, value_dim, scale = inputs
    keys = latents.flatten(0, 1).unsqueeze(1)
    out = queries.new_empty(*queries.shape[:2], value_dim)
    sums = torch.empty(*queries.shape[:2], SGLANG_SPLITS, dtype=torch.float32, device=queries.device)
    means = sums.new_empty(*sums.shape, value_dim)
    starts = functional.pad(lengths.cumsum(0), (1, 0)).int()
    splits = torch.full_like(lengths, SGLANG_SPLITS)
    slots = slots_of(inputs).flatten()
    given = (
        queries,
        keys,
        keys[..., :value_dim],
        out,
        starts,
        slots,
        means,
        sums,
        splits,
        SGLANG_SPLITS,
        scale,
    )

    def run() -> torch.Tensor:
        attend(*given, 1.0, 1.0)
        return out

    return run


def slots_of(inputs: DecodeInputs) -> torch.Tensor:
    """Where the tokens of equally long contexts lie, `[requests, tokens]` int64."""
    tokens = torch.arange(int(inputs.lengths[0]), device=inputs.pages.device)
    page_tokens = inputs.latents.shape[1]
    return inputs.pages[:, tokens // page_tokens].long() * page_tokens + tokens % page_tokens


def fa3_function() -> Callable | None:
    """FlashAttention 3 with the arguments of vLLM's interface, or None."""
    module = module_of("FlashAttention 3")
    if module is not None:
        return module.flash_attn_varlen_func
    return fa3_library if operations_of("_vllm_fa3_C", "fwd") is not None else None


def fa3_library(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None,
    softmax_scale=None, causal=False, block_table=None, **_,
) -> torch.Tensor:  # fmt: skip
    """The operation of vLLM's library: later versions have more arguments at the end."""
    attend = torch.ops._vllm_fa3_C.fwd
    given = [q, k, v, None, None, q_v, None, cu_seqlens_q, cu_seqlens_k, None, None, seqused_k]
    given += [max_seqlen_q, max_seqlen_k, block_table, *(None,) * 8]
    given += [softmax_scale, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None]
    return attend(*given[: len(attend.default._schema.arguments)])[0]


def fa3_options() -> dict[str, int]:
    """What vLLM's interface must be told besides."""
    module = module_of("FlashAttention 3")
    return {"fa_version": 3} if module is None or module.__name__.startswith("vllm") else {}


def fa3_decode(inputs: DecodeInputs) -> Run:
    """Absorbed attention by its argument for queries of the values, as vLLM calls it."""
    attend, (queries, latents, pages, lengths, value_dim, scale) = fa3_function(), inputs
    cache, starts = (
        latents.unsqueeze(2),
        torch.arange(len(lengths) + 1, dtype=torch.int32, device=pages.device),
    )
    parts = {"q": queries[..., value_dim:], "k": cache[..., value_dim:], "v": cache[..., :value_dim]}
    parts |= {"q_v": queries[..., :value_dim], "block_table": pages, "seqused_k": lengths}
    sizes = {"max_seqlen_q": 1, "cu_seqlens_q": starts, "max_seqlen_k": int(lengths[0])}
    return lambda: first(attend(**parts, **sizes, softmax_scale=scale, causal=True, **fa3_options()))


def prefill_peers(inputs: PrefillInputs) -> dict[str, Callable[[], Run]]:
    """Those that are there."""
    infer = module_of("FlashInfer")
    peers = {
        "FlashAttention 3": (fa3_function(), lambda: fa3_prefill(inputs)),
        "FlashInfer": (infer, lambda: flashinfer_prefill(inputs, infer)),
        "torch": (True, lambda: torch_prefill(inputs)),
    }
    return {name: ready for name, (there, ready) in peers.items() if there}


def torch_prefill(inputs: PrefillInputs) -> Run:
    """torch's own attention, by whichever backend it takes for these sizes."""
    whole = (inputs.queries, inputs.whole_keys(), inputs.values.contiguous())
    by_head = [part.transpose(0, 1).unsqueeze(0) for part in whole]

    def run() -> torch.Tensor:
        out = functional.scaled_dot_product_attention(*by_head, is_causal=True, scale=inputs.scale)
        return out.squeeze(0).transpose(0, 1)

    return run


def fa3_prefill(inputs: PrefillInputs) -> Run:
    """One prompt as a ragged batch of one."""
    attend, tokens = fa3_function(), len(inputs.queries)
    parts = {"q": inputs.queries, "k": inputs.whole_keys(), "v": inputs.values.contiguous()}
    sizes = {"max_seqlen_q": tokens, "cu_seqlens_q": inputs.starts}
    sizes |= {"max_seqlen_k": tokens, "cu_seqlens_k": inputs.starts}
    asked = {"softmax_scale": inputs.scale, "causal": True} | fa3_options()
    return lambda: first(attend(**parts, **sizes, **asked))


def flashinfer_prefill(inputs: PrefillInputs, library: ModuleType) -> Run:
    """Its wrapper for ragged prompts."""
    queries, values = inputs.queries, inputs.values.contiguous()
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=queries.device)
    wrapper = library.prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    heads, keys = queries.shape[1], inputs.whole_keys()
    asked = {"head_dim_vo": values.shape[2], "causal": True, "sm_scale": inputs.scale}
    wrapper.plan(
        inputs.starts, inputs.starts, heads, heads, queries.shape[2], **asked, q_data_type=queries.dtype
    )
    return lambda: wrapper.run(queries, keys, values)
