"""Gates, FP8 products and sampling as others compute them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks.gpu.case import Run
from benchmarks.gpu.draw import normal
from benchmarks.gpu.peers import module_of, operations_of
from benchmarks.gpu.roofline import scaled_product
from kernels.ops.gate import gate_noaux_tc_reference

SIGMOID = 1  # among the functions that vLLM's gate knows


class GateInputs(NamedTuple):
    """The arguments of `gate_noaux_tc`."""

    logits: torch.Tensor
    bias: torch.Tensor
    choices: int
    groups: int
    groups_kept: int
    is_normalised: bool
    scaling: float


def gate_peers(inputs: GateInputs) -> dict[str, Callable[[], Run]]:
    """Those that are there; orders of choices and ties differ, so that nothing is compared."""
    fused, sglang = operations_of("_moe_C", "grouped_topk"), module_of("SGLang gate")
    logits, bias, choices, groups, kept, is_normalised, scaling = inputs
    limits = (groups, kept, choices)
    peers = {
        "vLLM": (
            fused,
            lambda: lambda: unmatched(fused(logits, *limits, is_normalised, scaling, bias, SIGMOID)),
        ),
        "SGLang": (
            sglang,
            lambda: lambda: unmatched(sglang.moe_fused_gate(logits, bias, *limits, 0, scaling)),
        ),
        "torch": (True, lambda: lambda: gate_noaux_tc_reference(*inputs)),
    }
    return {name: ready for name, (there, ready) in peers.items() if there}


def unmatched(_: object) -> None:
    """A result that means the same in another form."""


def linear_peers(
    plain: torch.Tensor,
    hidden: torch.Tensor,
    hidden_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
) -> dict[str, Callable[[], Run]]:
    """DeepGEMM on the same numbers; torch with one scale for all, and in bfloat16 from twice the bytes."""
    library = module_of("DeepGEMM")
    peers = {"torch, one scale": lambda: torch_one_scale(hidden, weight)}
    peers["torch, bf16"] = lambda: torch_bf16(plain, weight)
    if library is not None:
        peers["DeepGEMM"] = lambda: deep_gemm(hidden, hidden_scales, weight, weight_scales)
    return peers if plain.is_cuda else {"torch, bf16": peers["torch, bf16"]}


def torch_one_scale(hidden: torch.Tensor, weight: torch.Tensor) -> Run:
    """The products alone: their scales are not these."""
    one = torch.ones((), device=hidden.device)
    return lambda: unmatched(scaled_product(hidden, weight, one))


def torch_bf16(hidden: torch.Tensor, weight: torch.Tensor) -> Run:
    """Weights of the same shape."""
    wide = weight.to(torch.bfloat16)
    return lambda: unmatched(functional.linear(hidden, wide))


def deep_gemm(
    hidden: torch.Tensor, hidden_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> Run:
    """Scales are brought into its order before."""
    library = module_of("DeepGEMM")
    arrange = getattr(library, "get_mn_major_tma_aligned_tensor", None)
    scales = hidden_scales if arrange is None else arrange(hidden_scales)
    out = torch.empty(len(hidden), len(weight), dtype=torch.bfloat16, device=hidden.device)

    def run() -> torch.Tensor:
        library.fp8_gemm_nt((hidden, scales), (weight, weight_scales), out)
        return out

    return run


def sample_peers(
    logits: torch.Tensor, top_p: float | None, temperature: float
) -> dict[str, Callable[[], Run]]:
    """torch; FlashInfer, from probabilities. Draws are other draws, so that only greedy ones are compared."""
    library = module_of("FlashInfer")
    if top_p is None:
        return {"torch": lambda: lambda: logits.argmax(dim=-1)}
    noise = normal(tuple(logits.shape), torch.float32, logits.device).abs()
    peers = {"torch": lambda: lambda: unmatched(torch_draw(logits, top_p, temperature, noise))}
    if library is not None and top_p < 1:
        draw = library.sampling.top_p_sampling_from_probs
        peers["FlashInfer"] = lambda: lambda: unmatched(draw((logits / temperature).softmax(dim=-1), top_p))
    return peers


def torch_draw(logits: torch.Tensor, top_p: float, temperature: float, noise: torch.Tensor) -> torch.Tensor:
    """A softmax, a sort where ranks matter, and the greatest of weights times noise that was drawn before."""
    weights = (logits / temperature).softmax(dim=-1)
    if top_p == 1:
        return (weights * noise).argmax(dim=-1)
    ranked, ids = weights.sort(dim=-1, descending=True)
    kept = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked > top_p, 0.0)
    return ids.gather(1, (kept * noise).argmax(dim=-1, keepdim=True))
