"""A bank of experts by formula in float64 and by the kernels: ragged, empty, in any company, the rest NaN."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from kernels.ops import expert_bank_kernel as kernel_module
from kernels.ops.backend import kernels_forced
from kernels.ops.expert_bank import (
    ExpertBank,
    experts_contiguous,
    experts_contiguous_reference,
    experts_masked,
    experts_masked_reference,
)
from kernels.ops.expert_bank_kernel import (
    FEW,
    SOME,
    TILES,
    WeightTable,
    experts_contiguous_kernel,
    experts_masked_kernel,
    tiles_count_max,
    tiles_for,
)
from kernels.ops.grouped_gemm_kernel import TILES_TOGETHER

HIDDEN, INTERMEDIATE = 136, 72  # no multiples of any block
BLOCKS_INTERMEDIATE = 264  # of three blocks of scales
NAN = float("nan")
KINDS = ("float32", "bfloat16", "fp8")
# Of the greatest number of an output. Rounding that to bfloat16 may take 2^-8; what lies between the products
# is rounded as well.
KERNEL_TOLERANCE = {"float32": 2e-6, "bfloat16": 5 * 2**-10, "fp8": 2**-8}
GPU_FACTOR = 2 if torch.cuda.is_available() else 1  # its exponentials and sums are another few bits off
FP8_TOLERANCE = 0.1  # what is lost by rounding all that is multiplied to four significant bits


def drawn_bank(
    kind: str, experts_count: int, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
) -> ExpertBank:
    """Experts whose outputs are about as large as what goes in."""
    gate_up = torch.randn(experts_count, 2 * intermediate, hidden) * 2 / hidden**0.5
    down = torch.randn(experts_count, hidden, intermediate) * 2 / intermediate**0.5
    if kind == "float32":
        return ExpertBank(gate_up, down)
    bank = ExpertBank(gate_up.bfloat16(), down.bfloat16())
    return bank.quantised() if kind == "fp8" else bank


def drawn_bank_of_blocks(kind: str, experts_count: int) -> ExpertBank:
    """The same, and with FP8 several blocks of intermediate, whose scales are far apart."""
    if kind != "fp8":
        return drawn_bank(kind, experts_count)
    bank = drawn_bank("bfloat16", experts_count, intermediate=BLOCKS_INTERMEDIATE)
    rising = torch.logspace(-2, 2, 2 * BLOCKS_INTERMEDIATE)  # from the first of gate to the last of up
    gate_up = [(weight * rising[:, None]).bfloat16() for weight in bank.gate_up]
    down = [(weight / rising[::2]).bfloat16() for weight in bank.down]  # so that all add as much
    return ExpertBank(gate_up, down).quantised()


def drawn_hidden(kind: str, *shape: int) -> torch.Tensor:
    """Tokens as such a bank takes them."""
    return torch.randn(*shape, HIDDEN).to(torch.float32 if kind == "float32" else torch.bfloat16)


def moved(bank: ExpertBank, device: torch.device) -> ExpertBank:
    """The same bank elsewhere."""
    return ExpertBank(*zip(*([part.to(device) for part in parts] for parts in bank.experts()), strict=True))


def without_experts(bank: ExpertBank, lost: list[int]) -> ExpertBank:
    """The same bank, where some experts are NaN."""
    changed = replace(
        bank, gate_up=[one.clone() for one in bank.gate_up], down=[one.clone() for one in bank.down]
    )
    for expert in lost:
        for weight in (changed.gate_up[expert], changed.down[expert]):
            weight.copy_(torch.full(weight.shape, NAN).to(weight.dtype))
    return changed


def offsets_of(counts: list[int]) -> torch.Tensor:
    """Where each expert's slots begin, and the end."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def by_formula(hidden: torch.Tensor, bank: ExpertBank, expert: int) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))` in float64, nothing rounded on the way."""
    gate, up, down = bank.expert(expert, torch.float64)
    wide = hidden.double()
    return (functional.silu(wide @ gate.T) * (wide @ up.T)) @ down.T


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Nothing is off by more than a part of the greatest number."""
    assert result.shape == expected.shape
    if expected.numel():
        assert (result.cpu().double() - expected).abs().max() <= GPU_FACTOR * tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_formula(kind):
    bank, counts = drawn_bank(kind, 4), [3, 0, 1, 5]
    hidden, rows = drawn_hidden(kind, 6), torch.randint(6, (9,), dtype=torch.int32)
    result = experts_contiguous(hidden, rows, offsets_of(counts), bank)
    tolerance = FP8_TOLERANCE if kind == "fp8" else KERNEL_TOLERANCE[kind]
    assert result.dtype == hidden.dtype
    for expert, (begin, end) in enumerate(pairwise(offsets_of(counts).tolist())):
        expected = by_formula(hidden[rows[begin:end]], bank, expert)
        assert_close(result[begin:end], expected, tolerance)
        buffers = torch.full((4, 5, HIDDEN), NAN).to(hidden.dtype)
        buffers[expert, : end - begin] = hidden[rows[begin:end]]
        masked = experts_masked(buffers, torch.tensor(counts, dtype=torch.int32), bank, sum(counts))
        assert torch.equal(masked[expert, : end - begin], result[begin:end])


CONTIGUOUS = {
    "ragged": ("float32", [0, 1, 17, 0, 3]),
    "one expert": ("float32", [5]),
    "no slots": ("float32", [0, 0]),
    "several tiles in bfloat16": ("bfloat16", [0, 33, 1]),
    "64 tokens in bfloat16": ("bfloat16", [40, 1]),
    "128 tokens in bfloat16": ("bfloat16", [60]),
    "fp8": ("fp8", [2, 0, 1]),
    "64 tokens in fp8": ("fp8", [20]),
    "128 tokens in fp8": ("fp8", [65]),
}


@pytest.mark.parametrize(("kind", "counts"), CONTIGUOUS.values(), ids=CONTIGUOUS)
def test_sorted_slots_are_those_of_the_reference_and_nothing_else_is_read(kind, counts, device):
    bank = drawn_bank_of_blocks(kind, len(counts))
    wide = torch.full((8, HIDDEN + 32), NAN).to(drawn_hidden(kind, 1).dtype)
    hidden = wide[:, :HIDDEN]
    hidden[:7] = drawn_hidden(kind, 7)  # the last token is nobody's
    slots_count, padding_count = sum(counts), 3
    rows = torch.cat([torch.randint(7, (slots_count,)), torch.full((padding_count,), 2**30)]).to(torch.int32)
    idle = without_experts(bank, [expert for expert, count in enumerate(counts) if not count])
    result = experts_contiguous_kernel(
        wide.to(device)[:, :HIDDEN], rows.to(device), offsets_of(counts).to(device), moved(idle, device).table
    )
    assert result.dtype == hidden.dtype and len(result) == slots_count + padding_count
    expected = experts_contiguous_reference(hidden.double(), rows, offsets_of(counts), bank)
    assert_close(result[:slots_count], expected[:slots_count], KERNEL_TOLERANCE[kind])


def test_an_expert_may_have_more_tiles_than_go_together(device):
    tiles = tiles_for(torch.float32, 0)
    counts = [1, TILES_TOGETHER.value * tiles.gate_up.tokens + 5, 1]
    bank, hidden = drawn_bank("float32", 3, 72, 72), torch.randn(9, 72)
    rows, offsets = torch.randint(9, (sum(counts),), dtype=torch.int32), offsets_of(counts)
    result = experts_contiguous_kernel(
        *(part.to(device) for part in (hidden, rows, offsets)), moved(bank, device).table
    )
    expected = experts_contiguous_reference(hidden.double(), rows, offsets, bank)
    assert_close(result, expected, KERNEL_TOLERANCE["float32"])


def test_a_batch_without_slots_is_empty(device):
    table, none = (
        moved(drawn_bank("float32", 3), device).table,
        torch.zeros(0, dtype=torch.int32, device=device),
    )
    offsets = torch.zeros(4, dtype=torch.int32, device=device)
    assert experts_contiguous_kernel(torch.zeros(0, HIDDEN, device=device), none, offsets, table).shape == (
        0,
        HIDDEN,
    )


MASKED = {
    "float32": ("float32", 20, [0, 1, 18, 20], 0),
    "fewer than there is room for": ("float32", 20, [0, 1, 18, 20], 7),
    "of one token": ("float32", 40, [0, 1, 0], 0),
    "of nobody": ("float32", 4, [0, 0], 0),
    "bfloat16": ("bfloat16", 20, [3, 0, 20], 0),
    "bfloat16, 64 tokens": ("bfloat16", 66, [66, 1], 0),
    "fp8": ("fp8", 5, [0, 4, 1], 0),
    "fp8, 64 tokens": ("fp8", 70, [0, 40], 90),
}


@pytest.mark.parametrize(("kind", "capacity", "counts", "spare_count"), MASKED.values(), ids=MASKED)
def test_buffers_are_those_of_the_reference_and_nothing_else_is_read(
    kind, capacity, counts, spare_count, device
):
    bank = drawn_bank_of_blocks(kind, len(counts))
    hidden = drawn_hidden(kind, len(counts), capacity)
    for expert, count in enumerate(counts):
        hidden[expert, count:] = NAN
    idle = without_experts(bank, [expert for expert, count in enumerate(counts) if not count])
    device_counts = torch.tensor(counts, dtype=torch.int32, device=device)
    slots_max = sum(counts) + spare_count
    result = experts_masked_kernel(hidden.to(device), device_counts, moved(idle, device).table, slots_max)
    expected = experts_masked_reference(hidden.double(), device_counts.cpu(), bank, slots_max)
    for expert, count in enumerate(counts):
        assert_close(result[expert, :count], expected[expert, :count], KERNEL_TOLERANCE[kind])


def test_rows_that_are_not_there_are_not_written(device, monkeypatch):
    bank, hidden = drawn_bank("float32", 2), drawn_hidden("float32", 2, 4)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, 7.0))
    counts = torch.tensor([1, 3], dtype=torch.int32, device=device)
    result = experts_masked_kernel(hidden.to(device), counts, moved(bank, device).table, 4)
    assert (result[0, 1:] == 7).all() and (result[1, 3:] == 7).all()


class Launched:
    """A kernel that only notes how many programs it was launched with."""

    def __init__(self):
        self.programs_counts: list[int] = []

    def __getitem__(self, grid):
        self.programs_counts.append(math.prod(grid))
        return lambda *_, **__: None


def test_programs_follow_from_slots_and_not_from_buffers(monkeypatch):
    experts_count, capacity, slots_max = 256, 512, 4096
    launched = {name: Launched() for name in ("gate_up_tile", "down_tile", "_quantize_counted_rows")}
    for name, kernel in launched.items():
        monkeypatch.setattr(kernel_module, name, kernel)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        addresses = torch.empty(experts_count, 4, dtype=torch.int64, device="meta")
        table = WeightTable(addresses, 7168, 2048, dtype)
        hidden = torch.empty(experts_count, capacity, 7168, dtype=torch.bfloat16, device="meta")
        experts_masked_kernel(hidden, addresses[:, 0].int(), table, slots_max)
        tiles = tiles_for(dtype, slots_max / experts_count)
        for name, tile, columns in (("gate_up_tile", tiles.gate_up, 2048), ("down_tile", tiles.down, 7168)):
            tiles_max = slots_max // tile.tokens + experts_count
            assert launched[name].programs_counts[-1] <= tiles_max * -(-columns // tile.columns)
    assert launched["_quantize_counted_rows"].programs_counts == [kernel_module.QUANTISING_PROGRAMS]


def exact_bank() -> tuple[ExpertBank, torch.Tensor]:
    """An expert and 60 tokens, all sums of which are exact in float32, so that no order of adding shows.

    Tokens begin with 8, which gates multiply by 8: from there on sigmoid is 1.
    """
    hidden, gate_up = torch.randint(-2, 3, (60, HIDDEN)), torch.randint(-1, 2, (1, 2 * INTERMEDIATE, HIDDEN))
    hidden[:, 0] = 8
    gate_up[:, :INTERMEDIATE, 0] = 8
    down = torch.randint(-1, 2, (1, HIDDEN, INTERMEDIATE))
    return ExpertBank(gate_up.bfloat16(), down.bfloat16()), hidden.bfloat16()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_keeps_its_bits_in_any_company_and_in_tiles_of_any_size(kind, device):
    bank, hidden = drawn_bank(kind, 1), drawn_hidden(kind, 60)
    if device.type == "cpu":  # where products are those of a library, which adds in orders of its own
        bank, hidden = exact_bank()
        if kind == "float32":
            bank, hidden = ExpertBank([bank.gate_up[0].float()], [bank.down[0].float()]), hidden.float()
        elif kind == "fp8":
            bank = bank.quantised()
    table, hidden = moved(bank, device).table, hidden.to(device)

    def outputs(rows: list[int]) -> torch.Tensor:
        slots = torch.tensor(rows, dtype=torch.int32, device=device)
        return experts_contiguous_kernel(hidden, slots, offsets_of([len(rows)]).to(device), table)

    alone, few = outputs([5]), outputs([3, 5, 9])
    some, many = outputs([*range(20)]), outputs([*range(SOME + 1)])
    assert torch.equal(few[1], alone[0])
    assert torch.equal(some[[3, 5, 9]], few)
    assert torch.equal(many[:20], some)
    counts = torch.ones(1, dtype=torch.int32, device=device)
    assert torch.equal(experts_masked_kernel(hidden[None, 5:7].contiguous(), counts, table, 1)[0, :1], alone)


def test_the_public_functions_call_the_kernels_where_those_run(device):
    if device.type == "cuda":
        pytest.skip("there they always do")
    bank, hidden = drawn_bank("float32", 1), drawn_hidden("float32", 1, 2)
    rows, counts = torch.arange(2, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    with kernels_forced():
        contiguous, masked = (
            experts_contiguous(hidden[0], rows, offsets_of([2]), bank),
            experts_masked(hidden, counts, bank, 2),
        )
    assert_close(contiguous, by_formula(hidden[0], bank, 0), KERNEL_TOLERANCE["float32"])
    assert torch.equal(masked[0], contiguous)


@pytest.mark.parametrize("counts", [[1] * 9, [0] * 8 + [40], [17, 16, 1, 0], [], [0]], ids=str)
def test_programs_are_enough_for_any_spread_of_slots(counts):
    tiles_count = sum(-(-count // 16) for count in counts)
    for capacity in (0, 40):
        assert tiles_count <= tiles_count_max(sum(counts), len(counts), capacity, 16)


def test_tiles_grow_with_the_slots_of_an_expert():
    for dtype in TILES:
        tiles = [tiles_for(dtype, slots) for slots in (0, FEW, FEW + 0.1, SOME, SOME + 1, 1e6)]
        assert [tile.down.tokens for tile in tiles] == sorted(tile.down.tokens for tile in tiles)


def test_a_bank_that_is_quantised_has_its_scales_by_half():
    plain = drawn_bank("bfloat16", 2)
    bank = plain.quantised()
    assert [part.shape for part in bank.gate_up_scales] == [(2, 2)] * 2
    assert [part.shape for part in bank.down_scales] == [(2, 1)] * 2
    for mine, theirs in zip(bank.expert(1, torch.float32), plain.expert(1, torch.float32), strict=True):
        assert_close(mine, theirs.double(), 2**-4)


def test_weights_that_do_not_fit_are_refused():
    gate_up, down = torch.zeros(2, 8, 16), torch.zeros(2, 16, 4)
    with pytest.raises(ValueError, match=r"gate_up is .* give torch.float32 \[8, 16\]"):
        ExpertBank(gate_up[:, :7], down)
    with pytest.raises(ValueError, match="gate_up is there for 1 experts: give it for all 2"):
        ExpertBank(gate_up[:1], down)
    with pytest.raises(ValueError, match="down_scales is missing"):
        ExpertBank(gate_up.to(torch.float8_e4m3fn), down.to(torch.float8_e4m3fn), torch.ones(2, 2, 1))
    with pytest.raises(ValueError, match="leave those out"):
        ExpertBank(gate_up, down, down_scales=torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match="gate_up is on meta: give all of it on cpu"):
        ExpertBank(gate_up.to("meta"), down)
    with pytest.raises(ValueError, match="between multiples of 16 bytes"):
        ExpertBank([torch.zeros(129)[1:].view(8, 16)], down[:1])


def test_arguments_that_do_not_fit_are_refused():
    bank, rows = drawn_bank("float32", 2), torch.zeros(3, dtype=torch.int32)
    offsets, hidden = torch.zeros(3, dtype=torch.int32), torch.zeros(4, HIDDEN)
    with pytest.raises(ValueError, match=r"hidden is .* give \[tokens, 136\]"):
        experts_contiguous(hidden[:, 1:], rows, offsets, bank)
    with pytest.raises(ValueError, match=r"rows is torch.int64"):
        experts_contiguous(hidden, rows.long(), offsets, bank)
    with pytest.raises(ValueError, match=r"offsets is .* \[3\]"):
        experts_contiguous(hidden, rows, offsets[:2], bank)
    with pytest.raises(ValueError, match=r"give \[2, capacity, 136\]"):
        experts_masked(hidden, offsets[:2], bank, 3)
    with pytest.raises(ValueError, match=r"counts is .* \[2\]"):
        experts_masked(torch.zeros(2, 4, HIDDEN), offsets, bank, 3)
    with pytest.raises(ValueError, match=r"counts are 4 slots: give slots_max of as many, not 3"):
        experts_masked(torch.zeros(2, 4, HIDDEN), torch.tensor([4, 0], dtype=torch.int32), bank, 3)
