"""Grouping by expert against a plain sort: stable, ragged, empty, with slots of nobody, in both ways."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.ops import group_by_expert_kernel as module
from kernels.ops.backend import IS_INTERPRETED, kernels_forced
from kernels.ops.group_by_expert import group_by_expert, group_by_expert_reference
from kernels.ops.group_by_expert_kernel import group_by_counting, group_by_expert_kernel, group_by_sorting

WAYS = [group_by_counting, group_by_sorting, group_by_expert_reference]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that a few slots fill several, and the interpreter soon has them sorted."""
    monkeypatch.setattr(module, "BLOCK_SLOTS", 32)
    monkeypatch.setattr(module, "BLOCKS_READ", 2)
    monkeypatch.setattr(module, "COUNTED_SLOTS", 64)


def sorted_plainly(ids: list[int], experts_count: int) -> tuple[list[int], list[int], list[int]]:
    """Order, offsets and places by Python's own sort."""
    experts = [expert if 0 <= expert < experts_count else experts_count for expert in ids]
    order = sorted(range(len(ids)), key=experts.__getitem__)
    offsets = [sum(expert < begun for expert in experts) for begun in range(experts_count + 1)]
    places = [order.index(slot) if experts[slot] < experts_count else -1 for slot in range(len(ids))]
    return order, offsets, places


def assert_grouped(group, expert_ids: torch.Tensor, experts_count: int) -> None:
    """Group, and compare with a plain sort."""
    grouped = group(expert_ids, experts_count)
    assert [part.dtype for part in grouped] == [torch.int32] * 3
    expected = sorted_plainly(expert_ids.flatten().tolist(), experts_count)
    assert tuple(part.tolist() for part in grouped) == expected


@pytest.mark.parametrize("group", WAYS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (4, 8), (37, 3)], ids=str)
def test_slots_stand_in_stable_order_of_their_experts(shape, dtype, group, device):
    assert_grouped(group, torch.randint(0, 6, shape, dtype=dtype, device=device), 6)


@pytest.mark.parametrize("group", WAYS)
def test_an_id_that_no_expert_has_is_nobodys(group, device):
    ids = torch.tensor([[3, -1], [4, 0], [2**31 - 1, -(2**31)], [2**40, 3], [0, -(2**40)]], device=device)
    assert_grouped(group, ids, 4)
    assert_grouped(group, torch.full((5, 2), -1, device=device), 4)


@pytest.mark.parametrize("group", WAYS)
@pytest.mark.parametrize("experts_count", [1, 7, 8, 255, 256])
def test_experts_may_be_as_many_as_fill_a_width_or_not(experts_count, group, device):
    assert_grouped(group, torch.randint(-1, experts_count + 1, (5, 8), device=device), experts_count)


@pytest.mark.parametrize("group", [group_by_expert_kernel, group_by_expert_reference])
def test_no_slots_are_grouped_too(group, device):
    assert_grouped(group, torch.empty(0, 8, dtype=torch.int64, device=device), 3)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.integers(-2, 5), min_size=1, max_size=100),
    group=st.sampled_from(WAYS),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_slots_are_grouped(ids, group, dtype, device):
    assert_grouped(group, torch.tensor(ids, dtype=dtype, device=device)[:, None], 5)


def test_many_slots_are_sorted_and_few_are_counted(monkeypatch, device):
    monkeypatch.setattr(module, "COUNTED_SLOTS_MAX", 40)
    for name in ("group_by_counting", "group_by_sorting"):
        monkeypatch.setattr(module, name, lambda ids, experts_count, name=name: name)
    assert group_by_expert_kernel(torch.zeros(5, 8, device=device), 4) == "group_by_counting"
    assert group_by_expert_kernel(torch.zeros(41, 1, device=device), 4) == "group_by_sorting"


@pytest.mark.parametrize(
    ("kernel", "counts"),
    [
        (module._count_before, {"slots_count"}),
        (module._count_block, {"slots_count"}),
        (module._place_block, {"slots_count", "blocks_count"}),
    ],
)
def test_other_numbers_of_slots_compile_nothing_anew(kernel, counts):
    options = kernel.kwargs if IS_INTERPRETED else vars(kernel)
    assert counts <= set(options["do_not_specialize"])


def test_grouping_reaches_its_kernel(device):
    ids = torch.randint(0, 4, (6, 2), device=device)
    with kernels_forced() if device.type == "cpu" else nullcontext():
        assert_grouped(group_by_expert, ids, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens_count", [512, 513, 4096, 32_768])
def test_slots_of_real_steps_are_grouped_alike_every_time(monkeypatch, tokens_count, device):
    """Blocks as shipped, which no interpreter sorts in good time."""
    if device.type == "cpu":
        pytest.skip("the interpreter would take minutes")
    monkeypatch.undo()
    ids = torch.randint(-1, 257, (tokens_count, 8), device=device)
    expected = group_by_expert_reference(ids.cpu(), 256)
    for _ in range(3):
        for part, expected_part in zip(group_by_expert(ids, 256), expected, strict=True):
            assert torch.equal(part.cpu(), expected_part)
