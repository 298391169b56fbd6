"""The same weights under other experts, and the socket that nothing is plugged into."""

import pytest
import torch

from experts.local import LocalExperts
from kernels.model.checkpoint import Checkpoint
from kernels.model.moe import NoExperts
from kernels.model.transformer import Transformer, run_lanes
from tests.kernels.model.test_transformer import drawn_prompts, lane_of


class Noting:
    """Experts that note in which layers they were asked."""

    def __init__(self, experts: LocalExperts):
        self.experts = experts
        self.layers: list[int] = []

    def dispatch(self, layer, hidden, expert_ids, expert_weights):
        """As the socket has it."""
        self.layers.append(layer)
        return self.experts.dispatch(layer, hidden, expert_ids, expert_weights)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_folder) -> Checkpoint:
    """The tiny one: layers 1 and 2 have experts."""
    return Checkpoint(checkpoint_folder)


@pytest.fixture(scope="module")
def local(checkpoint) -> LocalExperts:
    """All experts."""
    return LocalExperts.from_checkpoint(checkpoint, torch.float32)


@pytest.fixture(scope="module")
def empty(checkpoint) -> Transformer:
    """Weights that nobody serves from."""
    return Transformer.from_checkpoint(checkpoint, torch.float32, NoExperts())


def logits_of(transformer: Transformer, prompts: list[list[int]]) -> torch.Tensor:
    """Of the last tokens."""
    with torch.inference_mode():
        [hidden] = run_lanes([lane_of(transformer, prompts)])
        return transformer.logits(hidden)


def test_plugged_later_it_gives_the_same_bits(checkpoint, local, empty):
    prompts = drawn_prompts(5, 70)
    expected = logits_of(Transformer.from_checkpoint(checkpoint, torch.float32, local), prompts)
    assert torch.equal(logits_of(empty.plugged_into(local), prompts), expected)


def test_each_asks_its_own_experts(local, empty):
    first, second = Noting(local), Noting(local)
    one, other = empty.plugged_into(first), empty.plugged_into(first).plugged_into(second)
    prompts = drawn_prompts(9)
    expected = logits_of(one, prompts)
    assert (first.layers, second.layers) == ([1, 2], [])
    assert torch.equal(logits_of(other, prompts), expected)
    assert (first.layers, second.layers) == ([1, 2], [1, 2])


def test_it_costs_no_memory(local, empty):
    twin = empty.plugged_into(local)
    assert twin is not empty and twin.config is empty.config and twin.dtype == empty.dtype
    assert twin._embedding is empty._embedding and twin._head is empty._head
    assert twin.layers is empty.layers and twin.routed is local and empty.routed is not local


def test_an_empty_socket_says_so(local, empty):
    empty.plugged_into(local)
    with pytest.raises(RuntimeError, match="layer 1: this model is plugged into no experts"):
        logits_of(empty, drawn_prompts(3))
