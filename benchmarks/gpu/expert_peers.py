"""Grouped products as DeepGEMM and torch compute them.

DeepGEMM offers the products alone: what is timed is both, without SwiGLU and quantisation between them, on
rows that were gathered, padded and quantised before. That is in its favour.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks.gpu.case import Run
from benchmarks.gpu.draw import normal
from benchmarks.gpu.peers import module_of
from kernels.ops.expert_bank import ExpertBank
from kernels.ops.quantize import quantize_rows

ALIGNED_ROWS = 128  # of an expert, in DeepGEMM's contiguous layout


class ExpertInputs(NamedTuple):
    """The arguments of `experts_contiguous`."""

    hidden: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    bank: ExpertBank

    def counts(self) -> torch.Tensor:
        """Slots of each expert, `[experts]` int32."""
        return self.offsets.diff()

    def buffers(self, capacity: int) -> torch.Tensor:
        """Rows of each expert in a buffer of its own `[experts, capacity, hidden]`; the rest is random."""
        shape = (len(self.bank.down), capacity, self.hidden.shape[1])
        buffers = normal((1, capacity, shape[2]), self.hidden.dtype, self.hidden.device).repeat(
            shape[0], 1, 1
        )
        experts, places = self.places(self.offsets[:-1])
        buffers[experts, places] = self.hidden[self.rows]
        return buffers

    def places(self, begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each slot's expert, and its number from where its expert begins."""
        slots = torch.arange(len(self.rows), device=self.rows.device)
        experts = torch.searchsorted(self.offsets[1:].long(), slots, right=True)
        return experts, slots - begins[experts].long()


def contiguous_peers(inputs: ExpertInputs) -> dict[str, Callable[[], Run]]:
    """Those that are there for weights of this format."""
    library = module_of("DeepGEMM")
    peers = {"torch": (not inputs.bank.is_quantised, lambda: torch_contiguous(inputs))}
    peers["DeepGEMM, products alone"] = (library, lambda: deep_gemm_contiguous(inputs, library))
    return {name: ready for name, (there, ready) in peers.items() if there}


def masked_peers(inputs: ExpertInputs, capacity: int) -> dict[str, Callable[[], Run]]:
    """Those that are there."""
    library = module_of("DeepGEMM")
    if library is None:
        return {}
    return {"DeepGEMM, products alone": lambda: deep_gemm_masked(inputs, capacity, library)}


def torch_contiguous(inputs: ExpertInputs) -> Run:
    """torch's grouped product of bfloat16, which has no FP8 weights in blocks."""
    hidden, rows, offsets, bank = inputs
    gate_up, down, ends = bank.gate_up.mT, bank.down.mT, offsets[1:]

    def run() -> torch.Tensor:
        gate, up = torch._grouped_mm(hidden[rows], gate_up, offs=ends).chunk(2, dim=1)
        return torch._grouped_mm(functional.silu(gate) * up, down, offs=ends)

    return run


def deep_gemm_contiguous(inputs: ExpertInputs, library: ModuleType) -> Run:
    """Each expert's rows padded to whole tiles, of which each row names its expert."""
    bank, padded = inputs.bank, -(-inputs.counts() // ALIGNED_ROWS) * ALIGNED_ROWS
    ends = padded.cumsum(0)
    experts, places = inputs.places(inputs.offsets[:-1])
    rows_count, device = int(ends[-1]), inputs.hidden.device
    gathered = inputs.hidden.new_zeros(rows_count, inputs.hidden.shape[1])
    gathered[(ends - padded)[experts] + places] = inputs.hidden[inputs.rows]
    every = torch.arange(rows_count, device=device)
    owners = torch.searchsorted(ends, every, right=True).int()
    inner = normal((rows_count, bank.down.shape[2]), torch.bfloat16, device)
    if bank.is_quantised:
        multiply = library.m_grouped_fp8_gemm_nt_contiguous
    else:
        multiply = library.m_grouped_bf16_gemm_nt_contiguous
    return two_products(bank, gathered, inner, lambda *given: multiply(*given, owners), library)


def deep_gemm_masked(inputs: ExpertInputs, capacity: int, library: ModuleType) -> Run:
    """Buffers of fixed size with the count of rows in each."""
    bank, counts = inputs.bank, inputs.counts()
    buffers = inputs.buffers(capacity)
    inner = normal((1, capacity, bank.down.shape[2]), torch.bfloat16, buffers.device)
    inner = inner.repeat(len(buffers), 1, 1)
    expected = max(1, -(-len(inputs.rows) // len(buffers)))
    names = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked")
    if not bank.is_quantised:
        names = ("m_grouped_bf16_gemm_nt_masked", "bf16_m_grouped_gemm_nt_masked")
    multiply = next(getattr(library, name) for name in names if hasattr(library, name))
    return two_products(bank, buffers, inner, lambda *given: multiply(*given, counts, expected), library)


def two_products(
    bank: ExpertBank, hidden: torch.Tensor, inner: torch.Tensor, multiply: Callable, library: ModuleType
) -> Run:
    """Rows by gates and ups, and other rows by downs, by one grouped product each."""
    outs = (hidden.new_empty(*hidden.shape[:-1], bank.gate_up.shape[1]), torch.empty_like(hidden))
    if bank.is_quantised:
        given = (
            (scaled(hidden, library), (bank.gate_up, bank.gate_up_scales), outs[0]),
            (scaled(inner, library), (bank.down, bank.down_scales), outs[1]),
        )
    else:
        given = ((hidden, bank.gate_up, outs[0]), (inner, bank.down, outs[1]))

    def run() -> None:
        for one in given:
            multiply(*one)

    return run


def scaled(rows: torch.Tensor, library: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in FP8, and their scales in the order in which DeepGEMM reads them fastest."""
    quantised, scales = quantize_rows(rows.reshape(-1, rows.shape[-1]))
    scales = scales.view(*rows.shape[:-1], -1)
    arrange = getattr(library, "get_mn_major_tma_aligned_tensor", None)
    return quantised.view(rows.shape), scales if arrange is None else arrange(scales)
