"""Routed experts: who goes where, their SwiGLU in both forms, and the mixture of what comes back."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch

from benchmarks.gpu.banks import bank_slice, random_bank
from benchmarks.gpu.case import Case, Ready, relative_error, share_differing
from benchmarks.gpu.draw import choices, normal
from benchmarks.gpu.expert_peers import ExpertInputs, contiguous_peers, masked_peers
from benchmarks.gpu.sizes import Counts, Dimensions
from benchmarks.gpu.timing import Waits
from benchmarks.gpu.work import BFLOAT16, FP8, Work, experts_work, rows_work
from kernels.ops.expert_bank import (
    ExpertBank,
    experts_contiguous,
    experts_contiguous_reference,
    experts_masked,
)
from kernels.ops.group_by_expert import group_by_expert, group_by_expert_reference
from kernels.ops.mix import mix_placed, mix_placed_reference

CAPACITY_STEP = 64
CHECKED_EXPERTS = 3
EXPERTS_TOLERANCE = {BFLOAT16: 1e-2, FP8: 3e-2}  # FP8: a number between may be rounded the other way

cached_bank = lru_cache(maxsize=1)(random_bank)  # cases of a bank follow each other


def expert_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """Tokens over the experts of a shard, and over all of a layer."""
    for experts in dims.experts:
        for numbers in (FP8, BFLOAT16):
            for tokens in counts.expert_tokens:
                for form, ready in (("masked", ready_masked), ("contiguous", ready_contiguous)):
                    make = partial(ready, dims, experts, numbers, tokens)
                    yield Case("experts", f"{form}, {tokens} tokens, {experts} experts, {numbers}", make)


def drawn_inputs(
    dims: Dimensions, experts: int, numbers: str, tokens: int, device: torch.device
) -> ExpertInputs:
    """Tokens that choose different experts, each as likely as any other."""
    bank = cached_bank(experts, dims.hidden, dims.intermediate, numbers, device)
    hidden = normal((tokens, dims.hidden), torch.bfloat16, device)
    ids = choices(tokens, experts, dims.choices, device)
    order, offsets, _ = group_by_expert(ids, experts)
    return ExpertInputs(hidden, order // dims.choices, offsets, bank)


def work_of(dims: Dimensions, inputs: ExpertInputs, numbers: str, rows_read: int) -> Work:
    """Of the experts that these tokens have chosen."""
    met = int((inputs.counts() > 0).sum())
    return experts_work(len(inputs.rows), rows_read, met, dims.hidden, dims.intermediate, numbers)


def ready_contiguous(
    dims: Dimensions, experts: int, numbers: str, tokens: int, device: torch.device
) -> Ready:
    """Slots sorted by expert, as in prefill."""
    inputs = drawn_inputs(dims, experts, numbers, tokens, device)
    work = work_of(dims, inputs, numbers, tokens)

    def run() -> torch.Tensor:
        return experts_contiguous(*inputs)

    def error() -> float:
        out, offsets = run(), inputs.offsets.tolist()
        return largest_error(inputs, lambda expert: out[offsets[expert] : offsets[expert + 1]])

    return Ready(run, work, error, contiguous_peers(inputs), EXPERTS_TOLERANCE[numbers])


def ready_masked(dims: Dimensions, experts: int, numbers: str, tokens: int, device: torch.device) -> Ready:
    """Buffers of fixed size, as large as one expert could ever need for these tokens."""
    inputs = drawn_inputs(dims, experts, numbers, tokens, device)
    capacity = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
    buffers, counts = inputs.buffers(capacity), inputs.counts()
    work = work_of(dims, inputs, numbers, len(inputs.rows))

    def run() -> torch.Tensor:
        return experts_masked(buffers, counts, inputs.bank, len(inputs.rows))

    def error() -> float:
        out = run()
        return largest_error(inputs, lambda expert: out[expert, : int(counts[expert])])

    return Ready(run, work, error, masked_peers(inputs, capacity), EXPERTS_TOLERANCE[numbers])


def largest_error(inputs: ExpertInputs, rows_of: Callable[[int], torch.Tensor]) -> float:
    """Of the busiest experts, each alone in float32."""
    busiest = inputs.counts().argsort(descending=True)[:CHECKED_EXPERTS].tolist()
    return max(relative_error(rows_of(expert), alone(inputs, expert)) for expert in busiest)


def alone(inputs: ExpertInputs, expert: int) -> torch.Tensor:
    """What torch makes of one expert's rows."""
    begin, end = inputs.offsets[expert : expert + 2].tolist()
    bank: ExpertBank = bank_slice(inputs.bank, expert, expert + 1)
    own = torch.tensor([0, end - begin], dtype=torch.int32)
    return experts_contiguous_reference(inputs.hidden.float(), inputs.rows[begin:end], own, bank)


def group_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """All experts of a layer."""
    for tokens in counts.gate_tokens:
        sizes = f"{tokens} tokens, {dims.choices} of {dims.experts[-1]}"
        yield Case("group_by_expert", sizes, partial(ready_group, dims, tokens))


def ready_group(dims: Dimensions, tokens: int, device: torch.device) -> Ready:
    """Ids in; order, places and offsets out."""
    experts = dims.experts[-1]
    ids = choices(tokens, experts, dims.choices, device)
    expected = torch.cat(group_by_expert_reference(ids.cpu(), experts))
    work = rows_work(ids.numel(), 8, 8, 4 * (experts + 1))

    def run() -> tuple[torch.Tensor, ...]:
        return group_by_expert(ids, experts)

    peers = {"torch": lambda: Waits(lambda: group_by_expert_reference(ids, experts))}
    return Ready(run, work, lambda: share_differing(torch.cat(run()), expected), peers, 0.0)


def mix_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """Outputs of experts, back to their tokens."""
    for tokens in counts.gate_tokens:
        yield Case("mix", f"{tokens} tokens, {dims.choices} choices", partial(ready_mix, dims, tokens))


def ready_mix(dims: Dimensions, tokens: int, device: torch.device) -> Ready:
    """Bfloat16 rows in the order of their experts to float32 sums."""
    ids = choices(tokens, dims.experts[-1], dims.choices, device)
    outputs = normal((ids.numel(), dims.hidden), torch.bfloat16, device)
    weights = normal(tuple(ids.shape), torch.float32, device)
    places = group_by_expert(ids, dims.experts[-1])[2]
    work = rows_work(tokens, dims.choices * (2 * dims.hidden + 8), 4 * dims.hidden)

    def run() -> torch.Tensor:
        return mix_placed(outputs, weights, places)

    def by_torch() -> torch.Tensor:
        return mix_placed_reference(outputs, weights, places)

    return Ready(run, work, lambda: relative_error(run(), by_torch()), {"torch": lambda: by_torch}, 1e-4)
