"""The placement before anything is known of the load: pure functions from the shards there are to a table."""

from collections.abc import Sequence

from experts.messages import Placement, ShardAddress


def even_homes(shards_count: int, experts_count: int, replicas_count: int = 1) -> tuple[tuple[int, ...], ...]:
    """One layer's: neighbouring experts together, an expert's further replicas on the shards that follow."""
    return tuple(
        tuple(
            sorted(
                {
                    (expert * shards_count // experts_count + turn) % shards_count
                    for turn in range(replicas_count)
                }
            )
        )
        for expert in range(experts_count)
    )


def even_placement(
    shards: Sequence[ShardAddress], first_layer: int, layers_count: int, experts_count: int, epoch: int
) -> Placement:
    """Each expert once, each shard with as many as any other, or one more; raises ValueError."""
    if not 0 < len(shards) <= experts_count:
        raise ValueError(
            f"{len(shards)} shards for {experts_count} experts: there must be 1 to {experts_count}"
        )
    ordered = tuple(sorted(shards, key=lambda shard: shard.name))
    homes = even_homes(len(shards), experts_count)
    return Placement(epoch, first_layer, ordered, (homes,) * layers_count)
