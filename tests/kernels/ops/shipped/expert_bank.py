"""The experts of a V3 shard: 32 or 256 of them, bfloat16 and FP8, few tokens to many, both forms."""

import torch

from kernels.ops.expert_bank import ExpertBank
from kernels.ops.expert_bank_kernel import experts_contiguous_kernel, experts_masked_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

HIDDEN, INTERMEDIATE = 7168, 2048
CHOICES = 8
WGMMA = frozenset({"gate_up_tile", "down_tile"})


def bank(experts_count: int, is_quantised: bool) -> ExpertBank:
    """Experts without memory."""
    shapes = [(experts_count, 2 * INTERMEDIATE, HIDDEN), (experts_count, HIDDEN, INTERMEDIATE)]
    if not is_quantised:
        return ExpertBank(*(bfloat16(*shape) for shape in shapes))
    weights = [meta(*shape, dtype=torch.float8_e4m3fn) for shape in shapes]
    return ExpertBank(*weights, *(meta(*shape[:1], shape[1] // 128, shape[2] // 128) for shape in shapes))


def contiguous(experts_count: int, tokens_count: int, is_quantised: bool) -> Shipped:
    """Tokens of which each goes to eight of the experts."""

    def launch() -> None:
        rows = meta(CHOICES * tokens_count, dtype=torch.int32)
        offsets = meta(experts_count + 1, dtype=torch.int32)
        hidden = bfloat16(tokens_count, HIDDEN)
        experts_contiguous_kernel(hidden, rows, offsets, bank(experts_count, is_quantised))

    return Shipped(launch, WGMMA)


def masked(experts_count: int, capacity: int, is_quantised: bool) -> Shipped:
    """A fixed buffer for each expert."""

    def launch() -> None:
        hidden, counts = bfloat16(experts_count, capacity, HIDDEN), meta(experts_count, dtype=torch.int32)
        experts_masked_kernel(hidden, counts, bank(experts_count, is_quantised))

    return Shipped(launch, WGMMA)


SHIPPED = {
    f"experts_contiguous {experts_count} experts {tokens_count} tokens {name}": contiguous(
        experts_count, tokens_count, is_quantised
    )
    for name, is_quantised in (("bfloat16", False), ("fp8", True))
    for experts_count, tokens_count in ((256, 128), (32, 128), (32, 4096))
} | {
    f"experts_masked 32 experts {capacity} rows {name}": masked(32, capacity, is_quantised)
    for name, is_quantised in (("bfloat16", False), ("fp8", True))
    for capacity in (16, 128)
}
