"""From some homes of experts to others: pure functions over the tables that placements carry."""

from collections import Counter
from collections.abc import Iterator, Set

from experts.messages import Homes, Placement, ShardAddress


def with_homes(kept: Homes, target: Homes) -> Homes:
    """What was kept, and the target's homes for experts that have none."""
    return tuple(
        tuple(home or new for home, new in zip(homes, goal, strict=True))
        for homes, goal in zip(kept, target, strict=True)
    )


def homes_among(placement: Placement, shards: tuple[ShardAddress, ...]) -> Homes:
    """A placement's homes as indices into other shards; those that went are left out."""
    there = {shard.name: index for index, shard in enumerate(shards)}
    index_of = [there.get(shard.name) for shard in placement.shards]
    return tuple(
        tuple(
            tuple(sorted(index_of[shard] for shard in home if index_of[shard] is not None)) for home in homes
        )
        for homes in placement.homes
    )


def homes_fewest_count(placement: Placement, names: Set[str]) -> int:
    """On how many of the shards called `names` the expert of a placement is that has fewest homes there.

    As many as there are names where the placement is of no experts.
    """
    among = {index for index, shard in enumerate(placement.shards) if shard.name in names}
    counts = (len(among.intersection(home)) for homes in placement.homes for home in homes)
    return min(counts, default=len(names))


def loads_between(before: Homes, after: Homes) -> Counter[int]:
    """Replicas that each shard must load."""
    return Counter(
        shard
        for homes, goal in zip(before, after, strict=True)
        for old, new in zip(homes, goal, strict=True)
        for shard in set(new) - set(old)
    )


def steps_between(before: Homes, after: Homes, expert_bytes: int, step_bytes_max: int) -> Iterator[Homes]:
    """The homes after each step; the last is `after`, and nothing comes where there is nothing to do.

    No shard loads more than `step_bytes_max` in a step, or one expert. Layers go one after the other, whole
    where the bytes allow it, for a layer's slots are only as many. An expert's homes change at once, so that
    it has those of before or those of after.
    """
    loads_max = max(step_bytes_max // expert_bytes, 1)
    homes, loads, changed = [list(layer) for layer in before], Counter(), False
    for layer, goal in enumerate(after):
        for expert, new in enumerate(goal):
            old = homes[layer][expert]
            if new == old:
                continue
            gaining = set(new) - set(old)
            if any(loads[shard] >= loads_max for shard in gaining):
                yield tuple(map(tuple, homes))
                loads.clear()
            loads.update(gaining)
            homes[layer][expert], changed = new, True
    if changed:
        yield after


def check_homes(homes: Homes, placement: Placement) -> None:
    """Raises ValueError unless every expert of a placement has homes among its shards."""
    shapes = [len(layer) for layer in homes], [len(layer) for layer in placement.homes]
    if shapes[0] != shapes[1]:
        raise ValueError("the plan is for another model: its layers or experts are not those in force")
    shards_count = len(placement.shards)
    for layer, of_layer in enumerate(homes, placement.first_layer):
        for expert, home in enumerate(of_layer):
            if not home or list(home) != sorted(set(home)) or not 0 <= home[0] <= home[-1] < shards_count:
                raise ValueError(
                    f"layer {layer}, expert {expert}: homes {list(home)} are not one or more of"
                    f" shards 0 to {shards_count - 1} in ascending order"
                )
