"""Peers are given what they ask for: stand-ins of the same arguments compute in torch."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import attention_peers, expert_peers
from benchmarks.gpu.attention_cases import decode_error, ready_decode, ready_prefill
from benchmarks.gpu.attention_peers import DecodeInputs
from benchmarks.gpu.case import relative_error
from benchmarks.gpu.expert_cases import drawn_inputs
from benchmarks.gpu.sizes import TINY
from kernels.ops.latent_format import unpack_latents_reference
from kernels.ops.quantize import dequantize_blocks

CPU = torch.device("cpu")
REQUESTS, CONTEXT, HEADS = 3, 130, 2


def attend(queries, keys, values, scale, causal=False) -> torch.Tensor:
    """`queries [tokens, heads, size]` over `keys [tokens, heads or 1, size]`, in float32."""
    scores = (
        torch.einsum("qhd,khd->hqk", queries.float(), keys.float().expand(-1, queries.shape[1], -1)) * scale
    )
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(keys) - len(queries) + 1)
        scores = scores.masked_fill(later, float("-inf"))
    values = values.float().expand(-1, queries.shape[1], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(queries.dtype)


def paged(cache, pages, length) -> torch.Tensor:
    """Tokens of one request, of `cache [pages, page tokens, 1, size]`."""
    return cache[pages.long()].flatten(0, 1)[:length]


def dense_decode_fwd(q, cache, value_dim, lengths, pages, scale, causal, plan, splits):
    """FlashMLA's dense operation."""
    assert q.shape[1] == cache.shape[2] == 1 and pages.dtype == lengths.dtype == torch.int32
    rows = [paged(cache, one, length) for one, length in zip(pages, lengths.tolist(), strict=True)]
    outs = [attend(query, keys, keys[..., :value_dim], scale) for query, keys in zip(q, rows, strict=True)]
    return torch.stack(outs), None, "plan", "splits"


def sparse_decode_fwd(q, cache, slots, top, sink, plan, splits, more, more_slots, more_top, value_dim, scale):
    """FlashMLA's operation for chosen tokens in FP8."""
    assert slots.dtype == torch.int32 and slots.shape[:2] == (len(q), 1) and top is sink is more is None
    rows = unpack_latents_reference(cache.flatten(0, 2), value_dim)
    outs = []
    for query, own in zip(q, slots[:, 0].long(), strict=True):
        keys = rows[own].unsqueeze(1)
        outs.append(attend(query, keys, keys[..., :value_dim], scale))
    return torch.stack(outs), None, "plan", "splits"


def vllm_attention(q, k, v, out, sums, pages, lengths, means, splits, scale, page_size):
    """vLLM's Triton kernel."""
    assert means.shape[2] == splits and means.shape[3] == v.shape[3] + 1 and k.shape[1] == page_size
    for request, length in enumerate(lengths.tolist()):
        keys, values = paged(k, pages[request], length), paged(v, pages[request], length)
        out[request] = attend(q[request : request + 1], keys, values, scale)[0]


def sglang_attention(q, k, v, out, starts, slots, means, sums, splits, splits_max, scale, k_scale, v_scale):
    """SGLang's Triton kernel."""
    assert means.shape[2] == sums.shape[2] == splits_max and splits.shape == (len(q),)
    for request in range(len(q)):
        own = slots[starts[request] : starts[request + 1]]
        out[request] = attend(q[request : request + 1], k[own], v[own], scale)[0]


def fa3(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, softmax_scale, causal, cu_seqlens_k=None,
        seqused_k=None, q_v=None, block_table=None):  # fmt: skip
    """FlashAttention 3 over ragged prompts, or over pages with queries of the values."""
    assert causal and cu_seqlens_q[-1] == len(q)
    if block_table is None:
        assert cu_seqlens_k[-1] == len(k) == max_seqlen_k
        return attend(q, k, v, softmax_scale, causal)
    outs = []
    for request, length in enumerate(seqused_k.tolist()):
        keys, values = paged(k, block_table[request], length), paged(v, block_table[request], length)
        query = torch.cat([q_v[request : request + 1], q[request : request + 1]], dim=-1)
        outs.append(attend(query, torch.cat([values, keys], dim=-1), values, softmax_scale))
    return torch.cat(outs)


class LatentWrapper:
    """FlashInfer's wrapper for latents."""

    def __init__(self, workspace, backend):
        assert workspace.dtype == torch.uint8 and backend == "auto"

    def plan(self, starts, page_starts, pages, lengths, heads, value, position, page, causal, scale, q, kv):
        """Keep it all."""
        assert (heads, value, position) == (HEADS, TINY.value, TINY.position) and not causal
        self.given = page_starts, pages, lengths, scale

    def run(self, content, position, values, positions, return_lse):
        """Attend."""
        page_starts, pages, lengths, scale = self.given
        cache = torch.cat([values, positions], dim=-1).unsqueeze(2)
        table = pages.view(len(lengths), -1)
        assert page_starts.diff().tolist() == [table.shape[1]] * len(lengths)
        queries = torch.cat([content, position], dim=-1).unsqueeze(1)
        return dense_decode_fwd(queries, cache, values.shape[-1], lengths, table, scale, False, None, None)[
            0
        ].squeeze(1)


class RaggedWrapper:
    """FlashInfer's wrapper for prompts."""

    def __init__(self, workspace, layout):
        assert layout == "NHD"

    def plan(self, starts, key_starts, heads, key_heads, size, head_dim_vo, causal, sm_scale, q_data_type):
        """Keep the scale."""
        assert heads == key_heads and causal
        self.scale = sm_scale

    def run(self, q, k, v):
        """Attend."""
        return attend(q, k, v, self.scale, causal=True)


FLASHINFER = SimpleNamespace(
    mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=LatentWrapper),
    prefill=SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=RaggedWrapper),
)
MODULES = {
    "FlashInfer": FLASHINFER,
    "FlashAttention 3": SimpleNamespace(__name__="flash_attn_interface", flash_attn_varlen_func=fa3),
    "vLLM Triton": SimpleNamespace(decode_attention_fwd=vllm_attention),
    "SGLang Triton": SimpleNamespace(decode_attention_fwd=sglang_attention),
}
OPERATIONS = {"dense_decode_fwd": dense_decode_fwd, "sparse_decode_fwd": sparse_decode_fwd}


@pytest.fixture
def everyone(monkeypatch):
    """All peers of attention are there."""
    monkeypatch.setattr(attention_peers, "module_of", MODULES.get)
    monkeypatch.setattr(attention_peers, "operations_of", lambda _, name: OPERATIONS.get(name))
    monkeypatch.setattr(
        attention_peers.torch.ops, "_flashmla_C", SimpleNamespace(**OPERATIONS), raising=False
    )


@pytest.mark.parametrize("packs", [False, True], ids=["bf16", "FP8"])
def test_every_peer_of_decode_is_given_its_arguments(packs, everyone):
    ready = ready_decode(TINY, REQUESTS, CONTEXT, HEADS, packs, CPU)
    inputs = next(
        cell.cell_contents for cell in ready.run.__closure__ if isinstance(cell.cell_contents, DecodeInputs)
    )
    peers = {name: make for name, make in ready.peers.items() if not name.startswith("ours")}
    named = {"FlashMLA", "FlashInfer", "FlashAttention 3", "vLLM Triton", "SGLang Triton", "torch"}
    assert set(peers) == ({"FlashMLA, all tokens chosen", "torch"} if packs else named)
    for name, make in peers.items():
        assert decode_error(make()(), inputs) < 1e-2, name


def test_every_peer_of_prefill_is_given_its_arguments(everyone):
    ready = ready_prefill(TINY, CONTEXT, HEADS, CPU)
    expected = ready.run()
    assert set(ready.peers) == {"FlashInfer", "FlashAttention 3", "torch"}
    for name, make in ready.peers.items():
        assert relative_error(make()(), expected) < 1e-2, name


@pytest.mark.parametrize("numbers", ["fp8", "bf16"])
def test_deep_gemm_is_given_rows_with_their_experts(numbers, monkeypatch):
    seen = []

    def plain(weight, block) -> torch.Tensor:
        return dequantize_blocks(*weight, block) if isinstance(weight, tuple) else weight.float()

    def contiguous(rows, weights, out, owners):
        seen.append(("contiguous", plain(rows, (1, 128)), out.shape, owners))

    def masked(rows, weights, out, counts, expected):
        values = rows[0] if isinstance(rows, tuple) else rows
        seen.append(("masked", values.shape, out.shape, counts.tolist(), expected))

    name = {"fp8": "fp8", "bf16": "bf16"}[numbers]
    library = SimpleNamespace(**{f"m_grouped_{name}_gemm_nt_contiguous": contiguous})
    setattr(library, f"m_grouped_{name}_gemm_nt_masked", masked)
    monkeypatch.setattr(expert_peers, "module_of", lambda _: library)
    inputs = drawn_inputs(TINY, 4, numbers, 5, CPU)
    expert_peers.contiguous_peers(inputs)["DeepGEMM, products alone"]()()
    expert_peers.masked_peers(inputs, 64)["DeepGEMM, products alone"]()()
    (_, rows, wide, owners), (_, _, narrow, _) = seen[:2]
    present = [expert for expert, count in enumerate(inputs.counts().tolist()) if count]
    assert owners.tolist() == [expert for expert in present for _ in range(128)]
    assert wide == (len(owners), 2 * TINY.intermediate) and narrow == (len(owners), TINY.hidden)
    for place, expert in enumerate(present):
        begin, end = inputs.offsets[expert : expert + 2].tolist()
        own = rows[place * 128 : place * 128 + end - begin]
        assert relative_error(own, inputs.hidden[inputs.rows[begin:end]]) < 5e-2
    counts = inputs.counts().tolist()
    assert seen[2] == ("masked", (4, 64, TINY.hidden), (4, 64, 2 * TINY.intermediate), counts, 3)
    assert seen[3] == ("masked", (4, 64, TINY.intermediate), (4, 64, TINY.hidden), counts, 3)


def test_a_library_with_fewer_arguments_at_the_end_is_called_with_those(monkeypatch):
    called = []

    def fwd(*given):
        called.append(given)
        return "out", "sums", None, None

    schema = SimpleNamespace(arguments=range(34))
    fwd.default = SimpleNamespace(_schema=schema)
    monkeypatch.setattr(attention_peers.torch.ops, "_vllm_fa3_C", SimpleNamespace(fwd=fwd), raising=False)
    asked = {"softmax_scale": 0.5, "causal": True, "seqused_k": "used", "q_v": "qv", "block_table": "table"}
    assert attention_peers.fa3_library("q", "k", "v", 1, "starts", 9, **asked, fa_version=3) == "out"
    [given] = called
    assert len(given) == 34
    assert given[:6] == ("q", "k", "v", None, None, "qv")
    assert given[7] == "starts" and given[11:15] == ("used", 1, 9, "table")
    assert given[23:29] == (0.5, True, -1, -1, 0.0, True)
