"""Who is in the cluster, and which placement of experts follows from it: pure, time is an argument."""

from dataclasses import dataclass, replace

from decode.messages import NodeReport
from experts.messages import Placement, ShardAddress, ShardReport
from experts.placement import even_placement
from kernels.model.config import ModelConfig

STARTING, READY, DRAINING = "starting", "ready", "draining"
SILENT_S = 3.0
SETTLE_S = 1.0


@dataclass(frozen=True)
class Member:
    """One actor as it describes itself with each heartbeat."""

    name: str
    kind: str
    address: str
    state: str = READY
    pid: int = 0
    host: str = ""
    requests_count: int = 0
    loaded_share: float = 1.0
    report: NodeReport | ShardReport | None = None


@dataclass(frozen=True)
class View:
    """What the coordinator knows, as it goes back to every member.

    `placement` is what shards are to load; `placement_in_force` is what nodes dispatch by, once all shards have it.
    """

    members: tuple[Member, ...] = ()
    placement: Placement | None = None
    placement_in_force: Placement | None = None

    def of_kind(self, kind: str) -> tuple[Member, ...]:
        """Members of one kind, by name."""
        return tuple(member for member in self.members if member.kind == kind)

    @property
    def is_ready(self) -> bool:
        """Whether a request could be served: a node of each kind goes by the placement in force."""
        if self.placement_in_force is None:
            return False
        epoch = self.placement_in_force.epoch
        kinds = {
            member.kind
            for member in self.members
            if member.state == READY and isinstance(member.report, NodeReport) and member.report.experts_epoch >= epoch
        }
        return {"prefill", "decode"} <= kinds


class Membership:
    """The members heard of lately; a placement follows the shards as soon as their number has settled."""

    def __init__(self, model: ModelConfig, shards_expected_count: int):
        self._model = model
        self._shards_expected_count = shards_expected_count
        self._members: dict[str, Member] = {}
        self._heard_s: dict[str, float] = {}
        self._placement: Placement | None = None
        self._in_force: Placement | None = None
        self._shards_changed_s = 0.0
        self._shard_names: tuple[str, ...] = ()

    def heartbeat(self, member: Member, now_s: float) -> View:
        """Take a member's word and tell it what everybody has said."""
        self._members[member.name] = member
        self._heard_s[member.name] = now_s
        return self.view(now_s)

    def leave(self, name: str) -> None:
        """A member has ended in good order."""
        self._members.pop(name, None)
        self._heard_s.pop(name, None)

    def view(self, now_s: float) -> View:
        """The members not silent for too long, and the placements."""
        for name in [name for name, heard_s in self._heard_s.items() if now_s - heard_s > SILENT_S]:
            self.leave(name)
        members = tuple(sorted(self._members.values(), key=lambda member: member.name))
        self._place(members, now_s)
        return View(members, self._placement, self._in_force)

    def _place(self, members: tuple[Member, ...], now_s: float) -> None:
        shards = [member for member in members if member.kind == "experts" and member.state != DRAINING]
        names = tuple(shard.name for shard in shards)
        if names != self._shard_names:
            self._shard_names, self._shards_changed_s = names, now_s
        settled = len(shards) == self._shards_expected_count or now_s - self._shards_changed_s >= SETTLE_S
        if shards and settled and self._model.moe_layers:
            self._follow(shards)
        self._put_in_force(members)

    def _follow(self, shards: list[Member]) -> None:
        addresses = tuple(ShardAddress(shard.name, shard.address) for shard in shards)
        if self._placement is not None and self._placement.shards == addresses:
            return
        known = [shard.report.epoch for shard in shards if isinstance(shard.report, ShardReport)]
        epoch = 1 + max([self._placement.epoch if self._placement else 0, *known])
        model = self._model
        self._placement = even_placement(
            addresses, model.dense_layers_count, len(model.moe_layers), model.routed_experts_count, epoch
        )

    def _put_in_force(self, members: tuple[Member, ...]) -> None:
        if self._placement is None or self._placement == self._in_force:
            return
        epochs = {member.name: member.report.epoch for member in members if isinstance(member.report, ShardReport)}
        if all(epochs.get(shard.name, 0) >= self._placement.epoch for shard in self._placement.shards):
            self._in_force = self._placement


def without_load(member: Member) -> Member:
    """A member's report without its load table, which only the coordinator needs."""
    if isinstance(member.report, ShardReport):
        return replace(member, report=replace(member.report, load=()))
    return member
