"""The physical limit, measured beside everything else: copies, and products of bfloat16 and of FP8."""

from dataclasses import asdict, dataclass

import torch

from benchmarks.gpu.draw import normal
from benchmarks.gpu.timing import DeviceTimer
from benchmarks.gpu.work import BFLOAT16, FP8, Work

COPIED_BYTES = 1 << 32
PRODUCT = 8192


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the device was seen to do at most."""

    gb_s: float
    """Of a copy, counting bytes read and bytes written."""
    bf16_tflop_s: float
    fp8_tflop_s: float

    def tflop_s(self, numbers: str) -> float:
        """Of products of such numbers."""
        return {BFLOAT16: self.bf16_tflop_s, FP8: self.fp8_tflop_s}[numbers]

    def floor_us(self, work: Work) -> float:
        """No call does this work faster."""
        return max(work.bytes / self.gb_s / 1e3, work.flops / self.tflop_s(work.numbers) / 1e6)

    def limit(self, work: Work) -> str:
        """What the floor comes from."""
        memory = work.bytes / self.gb_s / 1e3
        return "memory" if memory >= work.flops / self.tflop_s(work.numbers) / 1e6 else "products"

    def figures(self) -> dict[str, float]:
        """For a file."""
        return asdict(self)


H200 = Roofline(gb_s=4300.0, bf16_tflop_s=790.0, fp8_tflop_s=1400.0)  # for arithmetic without one


def measured_roofline() -> Roofline:
    """Measured on random numbers, which are slower to multiply than zeros."""
    timer = DeviceTimer(is_warm=True, budget_us=60e3)
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = timer.measure(lambda: target.copy_(source)).us
    left, right = (normal((PRODUCT, PRODUCT), torch.float32, source.device) for _ in range(2))
    bf16 = left.bfloat16(), right.bfloat16()
    flops = 2 * PRODUCT**3
    bf16_us = timer.measure(lambda: bf16[0] @ bf16[1].t()).us
    fp8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    fp8_us = timer.measure(lambda: scaled_product(*fp8, one)).us
    return Roofline(2 * COPIED_BYTES / copy_us / 1e3, flops / bf16_us / 1e6, flops / fp8_us / 1e6)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`left [rows, in]` by `right [out, in]`, both FP8 with one float32 scale, by torch."""
    scales = {"scale_a": scale, "scale_b": scale}
    return torch._scaled_mm(left, right.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
