"""Shards, placements and tokens of these tests."""

import itertools

import torch

from experts.config import ShardConfig
from experts.messages import Placement, ShardAddress
from experts.placement import even_placement
from experts.shard import ExpertShard
from kernels.model.checkpoint import Checkpoint

SECRET = "a secret of the tests"
FIRST_LAYER, LAYERS, EXPERTS, CHOICES, HIDDEN = 1, 2, 16, 4, 128
numbers = itertools.count()


def make_shard(checkpoint: Checkpoint, name: str, address: str, dtype: torch.dtype) -> ExpertShard:
    """A shard that serves nothing yet."""
    return ExpertShard(ShardConfig(name, address, SECRET, memory_address()), checkpoint, dtype)


def memory_address() -> str:
    """An address of this process that nobody has had."""
    return f"memory://experts-{next(numbers)}"


def placed(addresses: dict[str, str], epoch: int = 1) -> Placement:
    """The even placement over shards by name."""
    shards = [ShardAddress(name, address) for name, address in addresses.items()]
    return even_placement(shards, FIRST_LAYER, LAYERS, EXPERTS, epoch)


def placed_on(*shards: ExpertShard, epoch: int = 1) -> Placement:
    """The same over shards that siblings may fetch from."""
    addresses = [
        ShardAddress(one.config.name, one.address, weights_address=one.weights_address) for one in shards
    ]
    return even_placement(addresses, FIRST_LAYER, LAYERS, EXPERTS, epoch)


def placed_at(weights_address: str, name: str) -> Placement:
    """All experts on one shard of which only siblings know something."""
    shards = [ShardAddress(name, "memory://nobody", weights_address=weights_address)]
    return even_placement(shards, FIRST_LAYER, LAYERS, EXPERTS, 1)


def drawn_tokens(
    count: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, and expert ids and weights of each token."""
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(count)])
    return torch.randn(count, HIDDEN).to(dtype), ids, torch.rand(count, CHOICES)
