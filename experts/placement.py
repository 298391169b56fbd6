"""Which expert sits where: pure functions from the shards there are to a table."""

from collections.abc import Sequence

from experts.messages import Placement, ShardAddress


def even_placement(
    shards: Sequence[ShardAddress], first_layer: int, layers_count: int, experts_count: int, epoch: int
) -> Placement:
    """Neighbouring experts together, each shard with as many as any other, or one more; raises ValueError."""
    if not 0 < len(shards) <= experts_count:
        raise ValueError(
            f"{len(shards)} shards for {experts_count} experts: there must be 1 to {experts_count}"
        )
    homes = tuple((expert * len(shards) // experts_count,) for expert in range(experts_count))
    ordered = tuple(sorted(shards, key=lambda shard: shard.name))
    return Placement(epoch, first_layer, ordered, (homes,) * layers_count)
