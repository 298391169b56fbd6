"""Members come, go, fall silent and come back; placements follow, and their epochs never go back."""

import pickle
from dataclasses import replace

import pytest

from cluster.membership import Membership
from cluster.view import (
    BEAT_S,
    DRAINING,
    HURRIED_BEATS_PER_S,
    HURRY_S,
    STARTING,
    Member,
    View,
    without_load,
)
from decode.messages import NodeReport
from experts.config import PlanConfig
from experts.errors import PlacementImpossible
from experts.load import ExpertLoad
from experts.messages import Placement, ShardReport
from experts.plan import Planner
from experts.rebalance import RebalanceConfig
from kernels.model.config import ModelConfig

RAY_INLINE_BYTES_MAX = 100 * 1024
FOLDER = "examples/trivium-small"


def shard(name: str, epoch: int = 0, **values) -> Member:
    """A shard as it describes itself."""
    address = values.pop("address", f"unix:///{name}")
    report = ShardReport(name, address, epoch, 0, 0, 0, 0, 0, load=b"")
    return Member(name, "experts", address, report=report, **values)


def node(name: str, kind: str, epoch: int = 0, **values) -> Member:
    """A prefill or decode node as it describes itself."""
    address = values.pop("address", f"unix:///{name}")
    report = NodeReport(name, kind, address, 0, 0, 0, 9, 9, 0, 0, 0, 0, epoch, 0)
    return Member(name, kind, address, report=report, **values)


class Town:
    """A membership and everybody who beats, by hand."""

    def __init__(self, expected_count: int = 2, folder_config: ModelConfig | None = None):
        self.config = folder_config or ModelConfig.from_folder(FOLDER)
        self.expected_count = expected_count
        self.planner = Planner.of_model(self.config, PlanConfig())
        self.membership = self.coordinator()
        self.members: dict[str, Member] = {}
        self.now_s = 0.0

    def coordinator(self) -> Membership:
        """A new one, which knows nobody."""
        return Membership(self.config, self.expected_count, self.planner, RebalanceConfig(), expert_bytes=1)

    def add(self, *members: Member) -> None:
        """Members that beat from now on."""
        self.members |= {member.name: member for member in members}

    def turn(self, beats_count: int = 1, obedient: bool = True) -> View:
        """Everybody beats, and goes by what comes back."""
        for _ in range(beats_count):
            self.now_s += BEAT_S
            for member in list(self.members.values()):
                view = self.membership.heartbeat(member, self.now_s)
                if obedient:
                    self.members[member.name] = follow(member, view)
        return self.membership.view(self.now_s)


def follow(member: Member, view: View) -> Member:
    """The member once it has done what a view asks for."""
    if isinstance(member.report, ShardReport) and view.placement:
        newest = max(member.report.epoch, view.placement.epoch)
        return replace(member, report=replace(member.report, epoch=newest))
    if isinstance(member.report, NodeReport) and view.placement_in_force:
        newest = max(member.report.experts_epoch, view.placement_in_force.epoch)
        return replace(member, report=replace(member.report, experts_epoch=newest))
    return member


def names(placement: Placement | None) -> list[str]:
    """The shards of a placement."""
    return [shard.name for shard in placement.shards] if placement else []


@pytest.fixture
def town() -> Town:
    """Two shards, a prefill and a decode node, all settled at epoch 1."""
    town = Town()
    town.add(shard("a"), shard("b"), node("p", "prefill"), node("d", "decode"))
    town.turn(3)
    return town


def test_a_cluster_settles_at_its_first_epoch(town):
    view = town.turn()
    assert view.placement.epoch == view.placement_in_force.epoch == 1
    assert names(view.placement) == ["a", "b"]
    assert view.is_ready
    assert view.is_settled


def test_nothing_is_placed_on_too_few_shards_at_the_start():
    town = Town()
    town.add(shard("a"))
    assert town.turn(10).placement is None
    town.add(shard("b"))
    assert names(town.turn().placement) == ["a", "b"]
    late = Town()
    late.add(shard("a"))
    assert names(late.turn(70).placement) == ["a"]


def test_a_placement_is_in_force_once_every_shard_has_it():
    town = Town()
    town.add(shard("a"), shard("b"))
    town.turn(4, obedient=False)
    town.members["a"] = shard("a", epoch=1)
    assert town.turn(2, obedient=False).placement_in_force is None
    town.members["b"] = shard("b", epoch=1)
    assert town.turn(obedient=False).placement_in_force.epoch == 1


def test_a_dead_shard_is_replaced_without_a_placement_between(town):
    del town.members["a"]
    town.turn(4)
    town.add(shard("c"))  # before the dead one has been silent long enough
    placements = [town.turn().placement for _ in range(8)]
    assert names(placements[-1]) == ["b", "c"]
    assert {tuple(names(placement)) for placement in placements} == {("a", "b"), ("b", "c")}
    assert placements[-1].epoch == 2
    assert {home for layer in placements[-1].homes for home in layer} == {(0,), (1,)}


def test_a_shard_that_was_only_late_changes_nothing(town):
    absent = town.members.pop("a")
    town.turn(5)
    town.add(absent)
    assert town.turn(10).placement.epoch == 1


def test_the_rest_take_over_when_nobody_replaces_a_shard(town):
    del town.members["a"]
    assert names(town.turn(12).placement_in_force) == ["b"]


def test_scaling_the_shards(town):
    town.add(shard("c"))
    assert names(town.turn(6).placement_in_force) == ["a", "b", "c"]
    town.members["a"] = replace(town.members["a"], state=DRAINING)
    view = town.turn(4)
    assert names(view.placement_in_force) == ["b", "c"]
    assert "a" in {member.name for member in view.members}, "it serves until nobody asks"


def test_more_shards_than_experts_are_left_idle(town):
    count = town.config.routed_experts_count
    town.add(*(shard(f"A{index:03}") for index in range(count)))
    placement = town.turn(6).placement_in_force
    assert len(placement.shards) == count
    assert {"a", "b"} <= set(names(placement)), "who has experts keeps some"


def test_a_new_coordinator_goes_on_after_the_last_epoch(town):
    town.add(shard("c"))
    town.turn(12)
    before = town.turn().placement_in_force
    town.membership = town.coordinator()
    assert town.membership.heartbeat(town.members["a"], town.now_s).placement is None
    town.members["d"] = replace(town.members["d"], placement=before)  # as heartbeats tell who knows of none
    view = town.turn(6)
    assert view.placement_in_force.epoch > before.epoch + 1000, "what was given out last may be on its way"
    assert view.placement_in_force.homes == before.homes, "the same shards hold the same experts"


def test_a_new_coordinator_is_told_where_experts_are(town):
    """They had moved by load, of which it knows nothing."""
    before = town.turn().placement_in_force
    moved = replace(before, epoch=9, homes=tuple(layer[::-1] for layer in before.homes))
    for name, member in town.members.items():
        if name in "ab":
            town.members[name] = replace(member, report=replace(member.report, epoch=9))
        else:
            told = replace(member.report, experts_epoch=9)
            town.members[name] = replace(member, report=told, placement=moved)
    town.membership = town.coordinator()
    town.planner.is_ready = True
    view = town.turn(8)
    assert view.placement_in_force.epoch > 9 and view.placement_in_force.homes == moved.homes


def test_a_new_coordinator_and_new_shards_do_not_fall_behind_the_nodes(town):
    town.add(shard("c"))
    town.turn(6)
    epoch = town.turn().placement_in_force.epoch
    nodes = {name: town.members[name] for name in ("p", "d")}
    town.membership = town.coordinator()
    town.members = {}
    town.add(shard("e"), shard("f"))
    town.turn(2)
    town.add(*nodes.values())  # heard of only after a placement has been made
    view = town.turn(4)
    assert view.placement_in_force.epoch > epoch
    assert view.is_settled


def test_who_takes_over_an_address_takes_the_place(town):
    town.add(node("p2", "prefill", address="unix:///p"))
    del town.members["p"]
    assert [member.name for member in town.turn().of_kind("prefill")] == ["p2"]


def test_gateways_share_an_address():
    town = Town()
    town.add(*(Member(name, "gateway", "127.0.0.1:50051") for name in ("g1", "g2")))
    assert len(town.turn().of_kind("gateway")) == 2


def test_members_without_an_address_do_not_replace_each_other():
    town = Town()
    town.add(*(Member(name, "decode", "", STARTING) for name in ("d1", "d2")))
    assert len(town.turn().of_kind("decode")) == 2


def test_silence_and_leaving(town):
    town.membership.leave("p")
    town.membership.leave("nobody")
    assert town.membership.view(town.now_s).of_kind("prefill") == ()
    views = [town.membership.view(town.now_s + beat * BEAT_S) for beat in range(1, 8)]
    assert views[-3].members and views[-1].members == ()


def test_a_coordinator_that_stood_still_forgets_nobody(town):
    members = {member.name for member in town.turn().members}
    town.now_s += 30.0
    town.membership.heartbeat(town.members["d"], town.now_s)
    view = town.membership.view(town.now_s)
    assert {member.name for member in view.members} == members
    del town.members["p"]
    assert "p" not in {member.name for member in town.turn(8).members}, "who is silent now is forgotten"


def test_ready_while_a_new_placement_spreads(town):
    town.add(shard("c"))
    views = [town.turn() for _ in range(8)]
    assert all(view.is_ready for view in views), "the placement before serves until the next is in force"
    assert not all(view.is_settled for view in views)


def test_not_ready_without_a_kind_or_a_placement(town):
    view = town.turn()
    for name in ("p", "d"):
        fewer = tuple(member for member in view.members if member.name != name)
        assert not replace(view, members=fewer).is_ready
        draining = tuple(
            replace(member, state=DRAINING) if member.name == name else member for member in view.members
        )
        assert not replace(view, members=draining).is_ready
    assert not replace(view, placement_in_force=None).is_ready
    assert not View().is_settled


def test_a_model_without_experts_needs_no_shards():
    config = replace(ModelConfig.from_folder(FOLDER), dense_layers_count=0)
    layers_count = config.layers_count
    town = Town(2, replace(config, dense_layers_count=layers_count))
    town.add(node("p", "prefill"), node("d", "decode"), shard("a"))
    view = town.turn(3)
    assert not town.config.moe_layers
    assert view.is_ready
    assert view.placement.epoch == 1


def test_load_tables_stay_with_the_coordinator():
    loaded = shard("a")
    loaded = replace(loaded, report=replace(loaded.report, load=b"much"))
    assert without_load(loaded).report.load == b""
    assert without_load(node("p", "prefill")).report == node("p", "prefill").report


def test_placements_that_a_member_knows_are_not_told_again(town):
    whole = town.turn()
    knows = frozenset(placement.epoch for placement in whole.placements)
    told = town.membership.heartbeat(replace(town.members["d"], epochs_known=knows), town.now_s)
    assert told.placement.homes == () and told.placement.epoch == whole.placement.epoch
    assert told.completed(whole).placements == whole.placements
    town.add(shard("c"))
    town.turn(12)
    news = town.membership.heartbeat(replace(town.members["d"], epochs_known=knows), town.now_s)
    now = town.membership.view(town.now_s)
    assert news.completed(whole).placements == news.placements == now.placements, "what is new is told whole"
    assert View().told_to(town.members["d"]) == View() == View().completed(whole)


def test_gateways_see_everybody_shards_each_other_and_nodes_nobody(town):
    town.add(Member("g", "gateway", "127.0.0.1:1"))
    whole = town.turn()
    seen = {name: town.membership.heartbeat(town.members[name], town.now_s) for name in "gapd"}
    assert seen["g"].members == whole.members
    assert [(member.name, member.report) for member in seen["a"].members] == [("a", None), ("b", None)]
    assert seen["p"].members == seen["d"].members == ()


def test_heartbeats_hurry_until_all_is_settled_and_less_where_members_are_many(town):
    assert town.turn().pace_s == BEAT_S
    town.add(shard("c"))
    assert min(town.turn().pace_s for _ in range(8)) == pytest.approx(5 / HURRIED_BEATS_PER_S)
    assert town.turn().pace_s == BEAT_S
    assert View().paced().pace_s == HURRY_S
    assert View(members=town.turn().members * 100).paced().pace_s == BEAT_S


def test_what_each_of_hundreds_is_told_is_short():
    """Every member hears from one coordinator twice a second: V3 on 144 shards and 48 nodes."""
    town = Town(expected_count=144)
    town.planner = Planner(PlanConfig(slots_max=256), 58, 256, 8)
    town.config = replace(town.config, layers_count=61, dense_layers_count=3, routed_experts_count=256)
    town.membership = town.coordinator()
    town.add(*(shard(f"shard-{number:03}") for number in range(144)))
    town.add(*(node(f"decode-{number:03}", "decode") for number in range(48)))
    assert town.turn(4).is_settled
    placements = frozenset(placement.epoch for placement in town.turn().placements)
    told = {
        name: town.membership.heartbeat(replace(town.members[name], epochs_known=placements), town.now_s)
        for name in ("shard-000", "decode-000")
    }
    loaded = town.members["shard-000"]
    load = ExpertLoad(3, 58, 256)
    for layer in range(3, 61):
        load.add(layer, range(256), range(1 << 30, (1 << 30) + 256))
    loaded = replace(loaded, report=replace(loaded.report, load=load.told()))
    assert len(pickle.dumps(loaded)) < RAY_INLINE_BYTES_MAX, "what is longer goes through Ray's object store"
    sizes = {name: len(pickle.dumps(view)) for name, view in told.items()}
    assert sizes["decode-000"] < 1000 and sizes["shard-000"] < 20_000


def test_a_newcomer_that_never_loads_holds_nobody_up(town):
    def turn_without_c(turns_count: int) -> View:
        for _ in range(turns_count):
            view = town.turn()
            town.members["c"] = shard("c")  # it beats, and loads nothing
        return view

    town.add(shard("c"))
    turn_without_c(2 * int(RebalanceConfig().stall_s / BEAT_S) + 12)
    del town.members["b"]
    assert names(turn_without_c(16).placement_in_force) == ["a"]


def test_a_newcomer_that_failed_once_is_given_something_again(town):
    town.add(shard("c"))
    beats_count = int(RebalanceConfig().stall_s / BEAT_S)
    for _ in range(beats_count + 12):
        town.turn()
        town.members["c"] = shard("c")
    view = town.turn(20)  # its disk is mended; it goes by placements that give it nothing
    assert names(view.placement) == ["a", "b"] and town.members["c"].report.epoch == view.placement.epoch
    assert names(town.turn(10 * beats_count).placement_in_force) == ["a", "b", "c"]


def test_slow_loaders_are_waited_for_at_the_first_start():
    town = Town(expected_count=8)
    durations_s = {f"s{turn}": 110.0 + 20 * turn / 7 for turn in range(8)}
    town.add(*(shard(name, loaded_share=0.0) for name in durations_s))
    epochs = set()
    for _ in range(280):
        view = town.turn(obedient=False)
        epochs |= {view.placement.epoch} if view.placement else set()
        for name, duration_s in durations_s.items():
            layers_count = min(int(58 * town.now_s / duration_s), 58)
            town.members[name] = shard(name, epoch=int(layers_count == 58), loaded_share=layers_count / 58)
    assert epochs == {1} and names(view.placement_in_force) == sorted(durations_s)


def test_a_placement_for_which_there_is_no_room_is_told_and_not_tried_again(town, monkeypatch):
    asked = []

    def impossible(load, shards, current):
        asked.append(shards)
        raise PlacementImpossible("3 slots are too few")

    monkeypatch.setattr(town.membership.experts, "solve", impossible)
    del town.members["a"]
    view = town.turn(20)
    assert names(view.placement_in_force) == ["a", "b"], "what was in force is"
    assert town.membership.problem == "3 slots are too few" and len(asked) == 1


def test_a_problem_is_over_once_another_placement_is_in_force(town, monkeypatch):
    experts = town.membership.experts

    def impossible(*_):
        raise PlacementImpossible("3 slots are too few")

    def arrives(*_):
        experts.in_force = replace(experts.in_force)

    monkeypatch.setattr(experts, "advance", impossible)
    town.turn()
    monkeypatch.setattr(experts, "advance", lambda *_: None)
    town.turn()
    assert town.membership.problem == "3 slots are too few"
    monkeypatch.setattr(experts, "advance", arrives)
    town.turn()
    assert town.membership.problem == ""


def test_no_shard_forgets_before_nodes_are_known(town):
    assert town.turn().nodes_epoch == 1
    town.membership = town.coordinator()
    assert town.membership.heartbeat(town.members["a"], town.now_s).nodes_epoch == 0
