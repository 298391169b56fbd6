"""From prompt to tokens by the GPU's kernels, and by their references on a CPU: the same tokens.

Without a GPU the kernels are interpreted, which shows all but speed: steps, windows, banks, layouts.
"""

from contextlib import nullcontext

import pytest
import torch

from cluster.events import RoutedRequest
from cluster.reference import Reference
from decode.messages import SamplingParameters
from experts.banked import BankedExperts
from kernels.model.checkpoint import Checkpoint
from kernels.ops.backend import kernels_forced
from tests.checkpoints import build, random_prompt

SAMPLING = SamplingParameters(temperature=0.0, tokens_max=3, ignore_eos=True)
LENGTHS = (66, 3)


def tokens_of(checkpoint: Checkpoint, packs: bool, device: str) -> list[list[int]]:
    """Greedy tokens after two prompts at a time."""
    experts = BankedExperts.from_checkpoint(checkpoint, torch.float32, None, device)
    reference = Reference(
        checkpoint, routed=experts, packs_latents=packs, device=device, keeps_fp8=packs, latents_bytes=8 << 20
    )
    requests = [
        RoutedRequest(f"r{length}", tuple(random_prompt("kernels", length)), SAMPLING) for length in LENGTHS
    ]
    tokens = [generation.token_ids for generation in reference.generate(requests)]
    reference.close()
    return tokens


@pytest.mark.parametrize(
    ("name", "packs"), [("groups", False), ("fp8", True)], ids=["float32", "weights and latents in FP8"]
)
def test_kernels_give_the_tokens_of_their_references(name, packs, device, tmp_path_factory):
    checkpoint = Checkpoint(build(name, tmp_path_factory.mktemp("checkpoint")))
    expected = tokens_of(checkpoint, packs, "cpu")
    with nullcontext() if device.type == "cuda" else kernels_forced():
        assert tokens_of(checkpoint, packs, device.type) == expected
