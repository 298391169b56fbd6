"""The placement before anything is known of the load: pure functions from the shards there are to a table."""

from collections import Counter
from collections.abc import Sequence

from experts.messages import Homes, Placement, ShardAddress


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


def filled(homes: Homes, shards_count: int, replicas_count: int) -> Homes:
    """The same homes, with more for experts that have too few: each on the shard that then holds fewest."""
    return tuple(_filled_layer(layer, shards_count, replicas_count) for layer in homes)


def _filled_layer(
    layer: tuple[tuple[int, ...], ...], shards_count: int, replicas_count: int
) -> tuple[tuple[int, ...], ...]:
    held = [sum(shard in home for home in layer) for shard in range(shards_count)]
    filled_homes = []
    for home in layer:
        while len(home) < replicas_count:
            others = (shard for shard in range(shards_count) if shard not in home)
            fewest = min(others, key=lambda shard: (held[shard], shard))
            held[fewest] += 1
            home = tuple(sorted((*home, fewest)))
        filled_homes.append(home)
    return tuple(filled_homes)


def housed(homes: Homes, able: Sequence[int]) -> Homes:
    """The same homes, and one on an able shard for each expert that has none; replicas make room for it."""
    return tuple(_housed_layer(layer, able) for layer in homes)


def _housed_layer(layer: tuple[tuple[int, ...], ...], able: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    held = Counter(shard for home in layer for shard in home)
    room = max(held.values(), default=0)
    housed_homes = []
    for home in layer:
        if not home:
            home = (min(able, key=lambda shard: (held[shard], shard)),)
            held[home[0]] += 1
        housed_homes.append(home)
    for expert, home in enumerate(housed_homes):
        over = [shard for shard in home if held[shard] > room]
        for shard in over[: len(home) - 1]:
            held[shard] -= 1
            housed_homes[expert] = tuple(other for other in housed_homes[expert] if other != shard)
    return tuple(housed_homes)


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
