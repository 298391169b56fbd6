"""Lanes: one or two micro-batches give the same bits, and one computes while the other's tokens travel."""

from collections.abc import Sequence

import pytest
import torch

from experts.local import LocalExperts
from kernels.model.attention import LatentAttention
from kernels.model.checkpoint import Checkpoint
from kernels.model.transformer import Lane, Transformer, run_lanes
from tests.kernels.model.models import compressed


class Travelling:
    """Routed experts that note who leaves and who comes back."""

    def __init__(self, experts: LocalExperts):
        self.experts = experts
        self.story: list[tuple[str, int, int]] = []

    def dispatch(self, layer, hidden, expert_ids, expert_weights):
        """Note a departure; the answer notes the return."""
        self.story.append(("leave", layer, len(hidden)))
        pending = self.experts.dispatch(layer, hidden, expert_ids, expert_weights)
        return Answer(self, layer, pending)


class Answer:
    """What comes back."""

    def __init__(self, travelling: Travelling, layer: int, pending):
        self.travelling, self.layer, self.pending = travelling, layer, pending

    def combine(self) -> torch.Tensor:
        """Note the return."""
        mixed = self.pending.combine()
        self.travelling.story.append(("return", self.layer, len(mixed)))
        return mixed


def lane_of(transformer: Transformer, prompts: Sequence[Sequence[int]]) -> Lane:
    """A lane of whole prompts, each attending to itself."""
    lengths = [len(prompt) for prompt in prompts]
    rotation = transformer.rotation(torch.cat([torch.arange(length) for length in lengths]))

    def attend(_: int, attention: LatentAttention, normed: torch.Tensor) -> torch.Tensor:
        queries, latents = compressed(attention, normed, rotation)
        pairs = zip(queries.split(lengths), latents.split(lengths), strict=True)
        return torch.cat([attention.expand(*pair) for pair in pairs])

    token_ids = torch.tensor([token for prompt in prompts for token in prompt])
    return transformer.lane(transformer.embed(token_ids), attend, transformer.routed)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request, checkpoint_folder) -> tuple[Transformer, Travelling]:
    """The tiny model and what its experts have noted."""
    checkpoint = Checkpoint(checkpoint_folder)
    travelling = Travelling(LocalExperts.from_checkpoint(checkpoint, request.param))
    return Transformer.from_checkpoint(checkpoint, request.param, travelling), travelling


def drawn_prompts(*lengths: int) -> list[list[int]]:
    """Random prompts."""
    return [torch.randint(2, 512, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("first_count", [1, 2, 3])
def test_one_or_two_micro_batches_give_the_same_bits(model, first_count):
    transformer, _ = model
    prompts = drawn_prompts(1, 70, 3, 64)
    with torch.inference_mode():
        [together] = run_lanes([lane_of(transformer, prompts)])
        parts = run_lanes(
            [lane_of(transformer, prompts[:first_count]), lane_of(transformer, prompts[first_count:])]
        )
        alone = [run_lanes([lane_of(transformer, [prompt])])[0] for prompt in prompts]
        assert together.dtype == transformer.dtype
        assert torch.equal(torch.cat(parts), together) and torch.equal(torch.cat(alone), together)
        logits = transformer.logits(together)
        assert logits.dtype == torch.float32 and logits.shape == (138, 512)
        assert torch.equal(transformer.logits(together[5:6]), logits[5:6])


def test_one_lane_computes_while_the_other_travels(model):
    transformer, travelling = model
    travelling.story.clear()
    with torch.inference_mode():
        run_lanes([lane_of(transformer, drawn_prompts(5)), lane_of(transformer, drawn_prompts(7))])
    first = [("leave", 1, 5), ("leave", 1, 7), ("return", 1, 5), ("leave", 2, 5), ("return", 1, 7)]
    assert travelling.story == [*first, ("leave", 2, 7), ("return", 2, 5), ("return", 2, 7)]


def counting(steps_count: int, result: int) -> Lane:
    """A lane that pauses so many times."""
    for _ in range(steps_count):
        yield
    return result


def failing() -> Lane:
    """A lane that fails after its first pause."""
    yield
    raise ValueError("the experts are gone")


def test_results_come_in_the_order_of_lanes_whichever_ends_first():
    assert run_lanes([counting(3, 1), counting(0, 2), counting(1, 3)]) == [1, 2, 3]
    assert run_lanes([]) == []


def test_a_lane_that_fails_is_heard_of():
    with pytest.raises(ValueError, match="the experts are gone"):
        run_lanes([counting(5, 1), failing()])
