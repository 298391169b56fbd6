"""The tiny checkpoint of these tests, and shards that are closed at their end."""

from collections.abc import Callable, Iterator

import pytest
import torch

from experts.local import LocalExperts
from experts.shard import ExpertShard
from kernels.model.checkpoint import Checkpoint
from tests.experts.dispatches import make_shard
from tests.fixtures import checkpoint_folder

__all__ = ["checkpoint_folder"]


@pytest.fixture(scope="session")
def checkpoint(checkpoint_folder) -> Checkpoint:
    """The tiny checkpoint: MoE layers 1 and 2 with 16 experts each, hidden states of 128."""
    return Checkpoint(checkpoint_folder)


@pytest.fixture(scope="session")
def local(checkpoint) -> LocalExperts:
    """All experts in this process: the truth."""
    return LocalExperts.from_checkpoint(checkpoint, torch.float32)


@pytest.fixture
def shard_at(checkpoint) -> Iterator[Callable[..., ExpertShard]]:
    """Makes shards, by name and address, and closes them in the end."""
    shards: list[ExpertShard] = []

    def make(name: str, address: str, dtype: torch.dtype = torch.float32) -> ExpertShard:
        shards.append(make_shard(checkpoint, name, address, dtype))
        return shards[-1]

    yield make
    for shard in shards:
        shard.close()
