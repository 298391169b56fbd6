"""Attention: absorbed over latents in pages, and expanded over whole prompts."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.attention_peers import DecodeInputs, PrefillInputs, decode_peers, prefill_peers
from benchmarks.gpu.case import Case, Ready, relative_error
from benchmarks.gpu.draw import TILE_ROWS, normal, shuffled, tiled_rows
from benchmarks.gpu.sizes import Counts, Dimensions
from benchmarks.gpu.work import mla_decode_work, mla_prefill_work
from kernels.ops.latent_format import pack_latents_reference, unpack_latents_reference
from kernels.ops.mla_decode import mla_decode, mla_decode_reference
from kernels.ops.mla_decode_kernel import mla_decode_kernel
from kernels.ops.mla_prefill import mla_prefill_ragged, mla_prefill_ragged_reference

PAGE_TOKENS = 64
CHECKED_QUERIES = 32


def decode_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """Requests of equal contexts, their pages anywhere."""
    for context in counts.decode_contexts:
        for heads in dims.heads:
            for packs in (False, True):
                for requests in counts.decode_requests:
                    sizes = f"{requests} x {context}, {heads} heads, {'FP8' if packs else 'bf16'} latents"
                    make = partial(ready_decode, dims, requests, context, heads, packs)
                    yield Case("mla_decode", sizes, make)


def ready_decode(
    dims: Dimensions, requests: int, context: int, heads: int, packs: bool, device: torch.device
) -> Ready:
    """One layer's attention of a decode step."""
    pages_each = -(-context // PAGE_TOKENS)
    slots_count = requests * pages_each * PAGE_TOKENS
    rows = normal((min(slots_count, TILE_ROWS), dims.latent), torch.bfloat16, device)
    rows = pack_latents_reference(rows, dims.value) if packs else rows
    latents = tiled_rows(rows, slots_count).view(-1, PAGE_TOKENS, rows.shape[1])
    pages = shuffled(len(latents), device).view(requests, pages_each).int()
    lengths = torch.full((requests,), context, dtype=torch.int32, device=device)
    queries = normal((requests, heads, dims.latent), torch.bfloat16, device)
    scale = (dims.content + dims.position) ** -0.5
    inputs = DecodeInputs(queries, latents, pages, lengths, dims.value, scale)
    row_bytes = latents.shape[2] * latents.element_size()
    work = mla_decode_work(requests, context, heads, dims.value, dims.position, row_bytes)

    def run() -> torch.Tensor:
        return mla_decode(*inputs)

    def run_by_batch() -> torch.Tensor:
        return mla_decode_kernel(*inputs, batch_invariant=False)

    peers = {"ours, split by the batch": lambda: run_by_batch} | decode_peers(inputs)
    return Ready(run, work, lambda: decode_error(run(), inputs), peers)


def decode_error(out: torch.Tensor, inputs: DecodeInputs) -> float:
    """Of the first and the last request, in float32."""
    errors = []
    for request in sorted({0, len(inputs.lengths) - 1}):
        context = inputs.latents[inputs.pages[request].long()]
        if context.dtype == torch.uint8:
            unpacked = unpack_latents_reference(context.flatten(0, 1), inputs.value_dim)
            context = unpacked.view(*context.shape[:2], -1)
        pages = torch.arange(len(context), dtype=torch.int32).unsqueeze(0)
        own = slice(request, request + 1)
        given = (inputs.queries[own].float(), context.float(), pages, inputs.lengths[own].cpu())
        errors.append(relative_error(out[own], mla_decode_reference(*given, inputs.value_dim, inputs.scale)))
    return max(errors)


def prefill_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """One prompt from its beginning to its end."""
    for tokens in counts.prefill_tokens:
        for heads in dims.heads:
            yield Case(
                "mla_prefill", f"{tokens} tokens, {heads} heads", partial(ready_prefill, dims, tokens, heads)
            )


def ready_prefill(dims: Dimensions, tokens: int, heads: int, device: torch.device) -> Ready:
    """Keys and values are views of one tensor, as latents are unfolded."""
    queries = normal((tokens, heads, dims.content + dims.position), torch.bfloat16, device)
    unfolded = normal((tokens, heads, dims.content + dims.head_value), torch.bfloat16, device)
    positions = normal((tokens, dims.position), torch.bfloat16, device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    keys, values = unfolded.split([dims.content, dims.head_value], dim=-1)
    scale = (dims.content + dims.position) ** -0.5
    inputs = PrefillInputs(queries, keys, positions, values, starts, scale)
    work = mla_prefill_work(tokens, heads, dims.content, dims.position, dims.head_value)

    def run() -> torch.Tensor:
        return mla_prefill_ragged(queries, keys, positions, values, starts, starts, scale, True, tokens)[0]

    return Ready(run, work, lambda: prefill_error(run(), inputs), prefill_peers(inputs))


def prefill_error(out: torch.Tensor, inputs: PrefillInputs) -> float:
    """Of the prompt's first queries and of its last ones, in float32."""
    tokens_count = len(out)
    count = min(CHECKED_QUERIES, tokens_count)
    errors = []
    for end in {count, tokens_count}:
        asked = slice(end - count, end)
        keys = (inputs.keys[:end], inputs.positions[:end], inputs.values[:end])
        bounds = (torch.tensor([0, count]), torch.tensor([0, end]), inputs.scale, True, count)
        wide = (tensor.float() for tensor in (inputs.queries[asked], *keys))
        errors.append(relative_error(out[asked], mla_prefill_ragged_reference(*wide, *bounds)[0]))
    return max(errors)
