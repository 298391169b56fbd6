"""Experts with random weights, made on the device one after the other: no checkpoint, no copy."""

import torch

from benchmarks.gpu.draw import normal
from benchmarks.gpu.work import BFLOAT16, FP8, blocks
from kernels.ops.expert_bank import ExpertBank

DTYPES = {BFLOAT16: torch.bfloat16, FP8: torch.float8_e4m3fn}
SCALE = 0.02  # about the spread of a trained model's weights


def random_bank(
    experts: int, hidden: int, intermediate: int, numbers: str, device: torch.device
) -> ExpertBank:
    """Normal weights with a standard deviation of 0.02."""
    dtype, is_fp8 = DTYPES[numbers], numbers == FP8
    gate_up = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype, device=device)
    down = torch.empty(experts, hidden, intermediate, dtype=dtype, device=device)
    for weights in (gate_up, down):
        for one in weights:
            drawn = normal(tuple(one.shape), torch.bfloat16, device)
            one.copy_(drawn if is_fp8 else drawn.mul_(SCALE))
    if not is_fp8:
        return ExpertBank(gate_up, down)
    rows, columns = blocks(intermediate), blocks(hidden)
    gate_up_scales = torch.full((experts, 2 * rows, columns), SCALE, device=device)
    return ExpertBank(gate_up, down, gate_up_scales, gate_up_scales.new_full((experts, columns, rows), SCALE))


def bank_slice(bank: ExpertBank, begin: int, end: int) -> ExpertBank:
    """Some neighbouring experts of a bank, on the same memory."""
    parts = (bank.gate_up, bank.down, bank.gate_up_scales, bank.down_scales)
    return ExpertBank(*(None if part is None else part[begin:end] for part in parts))
