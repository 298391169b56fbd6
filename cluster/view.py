"""What members of the cluster say of themselves, and what the coordinator tells each of the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.gateway_report import GatewayReport
from cluster.scaling import EXPERTS, GATEWAY, Hold
from decode.messages import NodeReport
from experts.messages import Placement, ShardReport

STARTING, READY, DRAINING = "starting", "ready", "draining"
BEAT_S = 0.5
HURRY_S = 0.05
HURRIED_BEATS_PER_S = 30.0  # of all members together; from fifteen members on it is their usual beat


@dataclass(frozen=True)
class Member:
    """One actor as it describes itself with each heartbeat."""

    name: str
    kind: str
    address: str
    state: str = READY
    pid: int = 0
    host: str = ""
    loaded_share: float = 1.0
    report: NodeReport | ShardReport | GatewayReport | None = None
    placement: Placement | None = None
    """That it goes by, told to a coordinator which knows of none."""
    epochs_known: frozenset[int] = frozenset()
    """Of placements that it need not be told again: a large model's table is long."""
    pool: str = ""
    """Deployment that its process belongs to, where that is not its kind: it is lent to another pool."""
    holds: tuple[Hold, ...] = ()
    """That it knows of, for a coordinator that has just begun."""


@dataclass(frozen=True)
class View:
    """What the coordinator knows; each member is told its part of it.

    `placement` is what shards are to load; once all have it, it is also `placement_in_force`: nodes go by it.
    """

    members: tuple[Member, ...] = ()
    placement: Placement | None = None
    placement_in_force: Placement | None = None
    nodes_epoch: int = 0
    """Epoch that every node goes by, or a later one: shards let go of what is older."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Kind of node wanted in the process of a member, where it is another than its own."""
    holds: tuple[Hold, ...] = ()
    """Counts of pools that people have set."""
    pace_s: float = HURRY_S
    """Seconds from one heartbeat of a member to its next."""

    def of_kind(self, kind: str) -> tuple[Member, ...]:
        """Members of one kind, by name."""
        return tuple(member for member in self.members if member.kind == kind)

    def told_to(self, member: Member) -> "View":
        """What a member goes by: a gateway sees everybody, a shard the shards, a node nobody.

        Of placements that it knows only the epoch is told.
        """

        def told(placement: Placement | None) -> Placement | None:
            is_known = placement is not None and placement.epoch in member.epochs_known
            return Placement(placement.epoch, placement.first_layer, (), ()) if is_known else placement

        placements = {"placement": told(self.placement), "placement_in_force": told(self.placement_in_force)}
        return replace(self, members=self._seen_by(member.kind), **placements)

    def _seen_by(self, kind: str) -> tuple[Member, ...]:
        """With hundreds of members, what all of them report is more than the coordinator can tell to all."""
        if kind == GATEWAY:
            return tuple(without_times(member) for member in self.members)
        if kind == EXPERTS:
            return tuple(replace(member, report=None) for member in self.of_kind(kind))
        return ()

    def completed(self, before: "View") -> "View":
        """The whole view, with the placements that `before` had and this one only names."""
        known = {placement.epoch: placement for placement in before.placements}

        def whole(placement: Placement | None) -> Placement | None:
            return known.get(placement.epoch, placement) if placement is not None else None

        return replace(
            self, placement=whole(self.placement), placement_in_force=whole(self.placement_in_force)
        )

    @property
    def placements(self) -> tuple[Placement, ...]:
        """What there is of both placements."""
        return tuple(one for one in (self.placement, self.placement_in_force) if one is not None)

    @property
    def is_ready(self) -> bool:
        """Whether a request could be served: a node of each kind goes by some placement.

        This and `is_settled` are for who sees all members.
        """
        kinds = {node.kind for node in self._nodes_ready() if node.report.experts_epoch > 0}
        return self.placement_in_force is not None and {"prefill", "decode"} <= kinds

    @property
    def is_settled(self) -> bool:
        """Whether every shard and node goes by the newest placement."""
        if self.placement is None or self.placement_in_force is None:
            return False
        epoch = self.placement.epoch
        return self.placement_in_force.epoch == epoch and all(
            node.report.experts_epoch >= epoch for node in self._nodes_ready()
        )

    def paced(self) -> "View":
        """The same, with heartbeats that hurry until it is settled: less so, the more members there are."""
        hurry_s = max(HURRY_S, len(self.members) / HURRIED_BEATS_PER_S)
        return replace(self, pace_s=BEAT_S if self.is_settled else min(hurry_s, BEAT_S))

    def _nodes_ready(self) -> list[Member]:
        return [
            member
            for member in self.members
            if member.state == READY and isinstance(member.report, NodeReport)
        ]


def without_times(member: Member) -> Member:
    """A gateway's report without its distributions, which only the coordinator needs."""
    if isinstance(member.report, GatewayReport):
        return replace(member, report=member.report.without_times())
    return member


def without_load(member: Member) -> Member:
    """A member's report without its load table, which only the coordinator needs."""
    if isinstance(member.report, ShardReport):
        return replace(member, report=replace(member.report, load=b""))
    return member
