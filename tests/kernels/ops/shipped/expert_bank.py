"""The experts of a V3 shard: 32 or 256, in both types and forms, few tokens to many; and those of V2-Lite."""

import torch

from kernels.ops.expert_bank_kernel import WeightTable, experts_contiguous_kernel, experts_masked_kernel
from tests.kernels.ops.shipping import Shipped, bfloat16, meta

SIZES = 7168, 2048  # hidden and intermediate
SIZES_OF_LITE = 2048, 1408
CHOICES = 8
WGMMA = frozenset({"gate_up_tile", "down_tile"})


def table(experts_count: int, is_quantised: bool, sizes: tuple[int, int] = SIZES) -> WeightTable:
    """Experts that are nowhere."""
    dtype = torch.float8_e4m3fn if is_quantised else torch.bfloat16
    return WeightTable(meta(experts_count, 4, dtype=torch.int64), *sizes, dtype)


def contiguous(
    experts_count: int, tokens_count: int, is_quantised: bool, sizes: tuple[int, int] = SIZES
) -> Shipped:
    """Tokens of which each goes to eight of the experts."""

    def launch() -> None:
        rows = meta(CHOICES * tokens_count, dtype=torch.int32)
        offsets = meta(experts_count + 1, dtype=torch.int32)
        hidden = bfloat16(tokens_count, sizes[0])
        experts_contiguous_kernel(hidden, rows, offsets, table(experts_count, is_quantised, sizes))

    return Shipped(launch, WGMMA)


def masked(experts_count: int, tokens_count: int, is_quantised: bool) -> Shipped:
    """A fixed buffer for each expert, as large as it could need if all of these tokens chose it."""

    def launch() -> None:
        capacity = max(tokens_count, 64)
        hidden, counts = bfloat16(experts_count, capacity, SIZES[0]), meta(experts_count, dtype=torch.int32)
        slots_max = CHOICES * tokens_count
        experts_masked_kernel(hidden, counts, table(experts_count, is_quantised), slots_max)

    return Shipped(launch, WGMMA)


SHIPPED = {
    f"experts_contiguous {experts_count} experts {tokens_count} tokens {name}": contiguous(
        experts_count, tokens_count, is_quantised
    )
    for name, is_quantised in (("bfloat16", False), ("fp8", True))
    for experts_count, tokens_count in ((256, 128), (32, 128), (32, 4096))
} | {
    f"experts_masked 32 experts {tokens_count} tokens {name}": masked(32, tokens_count, is_quantised)
    for name, is_quantised in (("bfloat16", False), ("fp8", True))
    for tokens_count in (16, 128)
}
SHIPPED["experts_contiguous V2-Lite 64 experts 128 tokens bfloat16"] = contiguous(
    64, 128, False, SIZES_OF_LITE
)
