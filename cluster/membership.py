"""Who is in the cluster, and which placement of experts follows from it: pure, time is an argument."""

from collections import Counter
from dataclasses import replace

from cluster.view import DRAINING, READY, Member, View, without_load
from decode.messages import NodeReport
from experts.errors import PlacementImpossible
from experts.load import RecentLoad
from experts.messages import Placement, ShardAddress, ShardReport
from experts.rebalance import Rebalance, RebalanceConfig, Solve
from kernels.model.config import ModelConfig

SILENT_S = 3.0
LATE_S = 1.5  # a shard that missed two heartbeats may be dead: no new placement until that is known
SETTLE_S = 1.0
EPOCH_MAX = 1 << 62
TAKE_OVER_EPOCHS = 1 << 20
OBSERVE_S = 0.4  # between one load taken from a shard and the next, however often it tells
LOAD_HALF_LIFE_S = 60.0
BURST_HALF_LIFE_S = 5.0
FIRST_SETTLE_S = 30.0  # at the start fewer shards than expected are most likely late, and all experts large


class Membership:
    """The members heard of lately; a placement follows the shards as soon as their number has settled."""

    def __init__(
        self,
        model: ModelConfig,
        shards_expected_count: int,
        solve: Solve,
        rebalance: RebalanceConfig,
        expert_bytes: int,
    ):
        layers_count, experts_count = len(model.moe_layers), model.routed_experts_count
        load = RecentLoad(layers_count, experts_count, LOAD_HALF_LIFE_S, BURST_HALF_LIFE_S)
        self.experts = Rebalance(rebalance, load, expert_bytes, solve)
        self._model = model
        self._shards_expected_count = shards_expected_count
        self.lost_counts: Counter[str] = Counter()
        """Members forgotten for their silence, by kind."""
        self._members: dict[str, Member] = {}
        self._heard_s: dict[str, float] = {}
        self._observed_s: dict[str, float] = {}
        self.problem = ""
        self._impossible: tuple[ShardAddress, ...] | None = None
        self._known_placement: Placement | None = None
        self._asked_s = 0.0
        self._shards_changed_s = 0.0
        self._shard_names: tuple[str, ...] = ()
        self._roles: dict[str, str] = {}

    def heartbeat(self, member: Member, now_s: float) -> View:
        """Take a member's word and tell it what it goes by."""
        self._forgive(now_s)
        self._forget_predecessor(member)
        self._learn(member, now_s)
        self._members[member.name] = replace(without_load(member), placement=None, epochs_known=frozenset())
        self._heard_s[member.name] = now_s
        return self.view(now_s).told_to(member)

    def leave(self, name: str) -> None:
        """A member has ended in good order."""
        self._members.pop(name, None)
        self._heard_s.pop(name, None)
        self._observed_s.pop(name, None)
        self._roles.pop(name, None)
        self.experts.leave(name)

    def silences_s(self, now_s: float) -> dict[str, float]:
        """Seconds since each member was heard, by name."""
        return {name: now_s - heard_s for name, heard_s in self._heard_s.items()}

    def lend(self, from_kind: str, to_kind: str) -> str | None:
        """Ask one node of a kind to serve as the other: one that is lent goes home first, then the idlest.

        Returns its name, or None where nobody can be asked; a process that serves as both kinds is not.
        """
        there = {(other.host, other.pid) for other in self._members.values() if other.kind == to_kind}
        nodes = [
            member
            for member in self._members.values()
            if member.kind == from_kind
            and member.state == READY
            and member.name not in self._roles
            and (member.host, member.pid) not in there
            and isinstance(member.report, NodeReport)
        ]
        nodes.sort(key=lambda node: (node.pool != to_kind, node.report.requests_count, node.name))
        if not nodes:
            return None
        self._roles[nodes[0].name] = to_kind
        return nodes[0].name

    def view(self, now_s: float) -> View:
        """The members not silent for too long, and the placements."""
        self._forgive(now_s)
        for name in [name for name, heard_s in self._heard_s.items() if now_s - heard_s > SILENT_S]:
            self.lost_counts[self._members[name].kind] += 1
            self.leave(name)
        members = tuple(sorted(self._members.values(), key=lambda member: member.name))
        self._place(members, now_s)
        if not self._model.moe_layers:
            no_experts = Placement(1, self._model.dense_layers_count, (), ())
            return View(members, no_experts, no_experts, roles=dict(self._roles)).paced()
        in_force = self.experts.in_force
        # no shard may let go of anything before nodes are known to go by what is in force
        epoch = min(nodes_epoch(members), in_force.epoch) if in_force is not None else 0
        return View(members, self.experts.placement, in_force, epoch, dict(self._roles)).paced()

    def _forgive(self, now_s: float) -> None:
        """Where nobody at all was heard for a while, it was this process that stood still, not they."""
        gap_s, self._asked_s = now_s - self._asked_s, now_s
        if gap_s > LATE_S:
            self._heard_s = {name: heard_s + gap_s for name, heard_s in self._heard_s.items()}

    def _forget_predecessor(self, member: Member) -> None:
        """Forget who had this member's address before it: only gateways share one."""
        if member.kind == "gateway" or not member.address:
            return
        for other in list(self._members.values()):
            is_there = (other.host, other.address) == (member.host, member.address)
            if is_there and other.name != member.name:
                self.leave(other.name)

    def _learn(self, member: Member, now_s: float) -> None:
        """Take a shard's progress and load, and a placement in force before this coordinator began."""
        if isinstance(member.report, ShardReport):
            self.experts.get_on(member.name, member.report.epoch, member.loaded_share, now_s)
        is_news = now_s - self._observed_s.get(member.name, -OBSERVE_S) >= OBSERVE_S
        if isinstance(member.report, ShardReport) and member.report.load and is_news:
            self._observed_s[member.name] = now_s
            totals = self.experts.load.read(member.name, member.report.load)
            self.experts.observe(member.name, totals, now_s)
        known = self._known_placement
        if member.placement is not None and (known is None or member.placement.epoch > known.epoch):
            self._known_placement = member.placement

    def _place(self, members: tuple[Member, ...], now_s: float) -> None:
        if not self._model.moe_layers:
            return
        shards = [member for member in members if member.kind == "experts" and member.state != DRAINING]
        names = tuple(shard.name for shard in shards)
        if names != self._shard_names:
            self._shard_names, self._shards_changed_s = names, now_s
        seen_epoch = max(map(epoch_of, members), default=0)
        epochs, in_force = {member.name: epoch_of(member) for member in members}, self.experts.in_force
        try:
            if shards and self._is_settled(shards, seen_epoch, now_s):
                self._follow(shards, seen_epoch, now_s)
            self.experts.advance(epochs, nodes_epoch(members), now_s)
        except PlacementImpossible as error:  # what is in force stays in force
            self.problem, self._impossible = str(error), self._placed(shards)
        else:
            if self.experts.in_force is not in_force:
                self.problem, self._impossible = "", None  # what is impossible still is told of anew

    def _is_settled(self, shards: list[Member], seen_epoch: int, now_s: float) -> bool:
        if any(now_s - self._heard_s[shard.name] > LATE_S for shard in shards):
            return False
        unchanged_s = now_s - self._shards_changed_s
        if self.experts.placement is None and seen_epoch > 0:  # this coordinator is new, the cluster is not
            return unchanged_s >= SETTLE_S
        if len(shards) == self._shards_expected_count:
            return True
        return unchanged_s >= (FIRST_SETTLE_S if self.experts.placement is None else SETTLE_S)

    def _follow(self, shards: list[Member], seen_epoch: int, now_s: float) -> None:
        """Place the experts anew if the shards are others, or if somebody goes by a later placement."""
        addresses, placement = self._placed(shards), self.experts.placement
        if placement is not None and placement.shards == addresses and seen_epoch <= placement.epoch:
            return
        if addresses == self._impossible:
            return
        self.problem, self._impossible = "", None
        if placement is None and seen_epoch > 0:  # what an earlier coordinator gave out may be on its way
            seen_epoch += TAKE_OVER_EPOCHS
        if placement is None and self._known_placement is not None:
            self.experts.begin(
                self._known_placement, now_s
            )  # a new coordinator goes on from where others are
        if self.experts.placement is not None:
            self.experts.go_on_with(addresses, seen_epoch, now_s)
            return
        homes = self.experts.solve(self.experts.load.shares(), addresses, None)
        first_layer = self._model.dense_layers_count
        self.experts.begin(Placement(1 + seen_epoch, first_layer, addresses, homes), now_s)

    def _placed(self, shards: list[Member]) -> tuple[ShardAddress, ...]:
        """Shards that get experts, by name; if there are too many, those that have some already."""
        placement = self.experts.placement
        holding = {shard.name for shard in placement.shards} if placement else set()
        shards = [shard for shard in shards if shard.name not in self.experts.laggards] or shards
        first = sorted(shards, key=lambda shard: (shard.name not in holding, shard.name))
        chosen = sorted(first[: self._model.routed_experts_count], key=lambda shard: shard.name)
        return tuple(
            ShardAddress(shard.name, shard.address, shard.host, shard.report.weights_address)
            for shard in chosen
        )


def epoch_of(member: Member) -> int:
    """Epoch of the placement that a member goes by; 0 before the first."""
    match member.report:
        case ShardReport() as report:
            return report.epoch
        case NodeReport() as report:
            return report.experts_epoch
    return 0


def nodes_epoch(members: tuple[Member, ...]) -> int:
    """Epoch that every node goes by which goes by any; as late as can be where there is no such node."""
    epochs = [
        member.report.experts_epoch
        for member in members
        if isinstance(member.report, NodeReport) and member.report.experts_epoch > 0
    ]
    return min(epochs, default=EPOCH_MAX)
