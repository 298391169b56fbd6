"""Experts come from shards that hold them, with the bits of the checkpoint, or else from the checkpoint."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, chain, cycle
from types import SimpleNamespace

import pytest
import torch

from experts import siblings
from experts.messages import FETCH, REFUSED, WEIGHTS, Placement, ShardAddress
from experts.placement import even_placement
from experts.shard import ExpertShard
from experts.siblings import checksum, sources_of
from kernels.ops.expert_mlp import GatedWeights
from kernels.transport.connect import LINKS, connect
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelClosed
from kernels.transport.tensors import as_bytes
from tests.experts.dispatches import (
    EXPERTS,
    FIRST_LAYER,
    LAYERS,
    SECRET,
    drawn_tokens,
    memory_address,
    placed,
    placed_at,
    placed_on,
)
from tests.experts.test_shard import Node
from tests.kernels.transport.stand_in_link import StandInLink

TIMEOUT_S = 10.0
DTYPES = [torch.float32, torch.bfloat16]


def same_weights(ours: GatedWeights, theirs: GatedWeights) -> bool:
    """Whether both have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(ours.plain(), theirs.plain(), strict=True))


@pytest.fixture
def old(shard_at) -> Callable[[torch.dtype], ExpertShard]:
    """Makes a shard that holds everything, and serves."""

    def make(dtype: torch.dtype) -> ExpertShard:
        shard = shard_at("old", memory_address(), dtype)
        shard.adopt(placed({"old": shard.address}))
        shard.start()
        return shard

    return make


def grown(old: ExpertShard, new: ExpertShard) -> tuple[Placement, Placement]:
    """What is in force, and a newer placement over both shards."""
    return placed_on(old, epoch=1), placed_on(old, new, epoch=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_shard_gets_its_experts_from_the_old_one(old, shard_at, dtype):
    holder, new = old(dtype), shard_at("new", memory_address(), dtype)
    in_force, placement = grown(holder, new)
    new.adopt(placement, in_force=in_force, alive={"old", "new"})
    wanted = placement.experts_of("new")
    assert new.report().fetched_count == len(wanted) == LAYERS * EXPERTS // 2
    for pair in wanted:
        assert same_weights(new._holding.experts[pair], holder._holding.experts[pair])


def test_what_a_sibling_does_not_hold_comes_from_the_checkpoint(old, shard_at):
    holder, new = old(torch.float32), shard_at("new", memory_address())
    in_force, placement = grown(holder, new)
    del holder._holding.experts[placement.experts_of("new")[0]]
    new.adopt(placement, in_force=in_force, alive={"old", "new"})
    assert new.report().fetched_count == LAYERS * EXPERTS // 2 - 1
    assert new.report().experts_count == LAYERS * EXPERTS // 2


def test_what_comes_from_siblings_and_from_the_checkpoint_is_one_progress(old, shard_at):
    holder, new = old(torch.float32), shard_at("new", memory_address())
    in_force, placement = grown(holder, new)
    wanted = placement.experts_of("new")
    for pair in wanted[:3]:
        del holder._holding.experts[pair]
    told: list[tuple[int, int]] = []
    new.adopt(placement, lambda *done: told.append(done), in_force, {"old", "new"})
    count = len(wanted)
    assert told == [(done, count) for done in [*range(1, count - 2), count]]


@pytest.fixture
def rests_s(monkeypatch) -> list[float]:
    """The rests taken, where each fetch takes 10 ms, but the second a second."""
    rests_s: list[float] = []
    times_s = accumulate(chain([0.0, 0.01, 0.0, 1.0], cycle([0.0, 0.01])))
    clock = SimpleNamespace(monotonic=lambda: next(times_s), sleep=rests_s.append)
    monkeypatch.setattr(siblings, "time", clock)
    return rests_s


def test_a_shard_rests_between_fetches(old, shard_at, rests_s):
    holder, new = old(torch.float32), shard_at("new", memory_address())
    placement = placed_on(holder, new, epoch=1)
    new.adopt(placement)
    new.adopt(placed_on(new, epoch=2), in_force=placement, alive={"old", "new"})
    count = new.report().fetched_count
    assert rests_s[:2] == [pytest.approx(siblings.REST * 0.01), siblings.REST_S_MAX]
    assert count == LAYERS * EXPERTS // 2 == len(rests_s) + 1


def test_of_several_homes_not_all_ask_the_same_first(old, shard_at, monkeypatch):
    holder = old(torch.float32)
    asked: list[str] = []
    monkeypatch.setattr(siblings.Siblings, "_ask", lambda self, address, *pair: asked.append(address))
    homes = {(FIRST_LAYER, 0): ["memory://one", "memory://other"]}
    for name in "abcdefgh":
        config = replace(holder.config, name=name)
        siblings.Siblings(config, holder._format, torch.device("cpu")).fetch(homes, lambda _: None)
    assert set(asked[::2]) == set(asked[1::2]) == {"memory://one", "memory://other"}


def test_what_has_become_urgent_is_fetched_without_rests(old, shard_at, rests_s):
    holder, new = old(torch.float32), shard_at("new", memory_address())
    placement = placed_on(holder, new, epoch=1)
    new.adopt(placement)
    given = (None, placement, {"old", "new"}, lambda: len(rests_s) == 3)
    new.adopt(placed_on(new, epoch=2), *given)
    assert new.report().fetched_count > 4 and len(rests_s) == 3


def test_a_dead_sibling_is_not_waited_for_again_and_again(old, shard_at):
    holder, new = old(torch.float32), shard_at("new", memory_address())
    in_force, placement = grown(holder, new)
    holder.close()
    new.adopt(placement, in_force=in_force, alive={"old", "new"})
    assert new.report().fetched_count == 0 and new.report().experts_count == LAYERS * EXPERTS // 2


def lies() -> dict[str, Callable]:
    """What a sibling might send instead of the weights asked for."""

    def altered(weights: GatedWeights) -> tuple:
        parts = [as_bytes(part.clone()) for part in weights.plain()]
        told = checksum(parts)
        parts[0][0] ^= 1
        return told, parts

    def no_number(weights: GatedWeights) -> tuple:
        gate_up, down = (part.clone() for part in weights.plain())
        down[0, 0] = float("nan")
        parts = [as_bytes(gate_up), as_bytes(down)]
        return checksum(parts), parts

    def short(weights: GatedWeights) -> tuple:
        parts = [as_bytes(weights.plain()[0])]
        return checksum(parts), parts

    return {"altered": altered, "no number": no_number, "short": short}


@pytest.mark.parametrize("lie", lies().values(), ids=lies())
def test_weights_that_are_not_right_are_not_taken(lie, old, shard_at):
    holder, new = old(torch.float32), shard_at("new", memory_address())
    weights = next(iter(holder._holding.experts.values()))

    def answer(channel, frame) -> None:
        told, parts = lie(weights)
        channel.send(WEIGHTS, [frame.body[0], told], parts)

    liar = Endpoint(memory_address(), SECRET, "liar", answer)
    liar.start()
    in_force = placed_at(liar.address, "liar")
    new.adopt(placed({"liar": liar.address, "new": new.address}, epoch=2), None, in_force, {"liar"})
    liar.close()
    assert new.report().fetched_count == 0
    for pair, held in new._holding.experts.items():
        assert same_weights(held, holder._holding.experts[pair])


def test_a_fetch_of_what_is_not_here_is_refused_and_one_of_no_use_costs_the_channel(old):
    channel = connect(old(torch.float32).weights_address, SECRET, "sibling", TIMEOUT_S)
    channel.send(FETCH, [7, FIRST_LAYER, EXPERTS])
    frame = channel.receive(TIMEOUT_S)
    assert frame.kind == REFUSED and frame.body[0] == 7
    channel.send(FETCH, ["seven", FIRST_LAYER, 0])
    with pytest.raises(ChannelClosed):
        channel.receive(TIMEOUT_S)
    channel.close()


def test_a_dispatch_does_not_wait_for_a_fetch(old, monkeypatch):
    """Both come at once; to sum the bytes up takes long."""
    holder, real, told_s = old(torch.float32), siblings.checksum, []

    def slow(parts) -> int:
        time.sleep(0.3)
        told_s.append(time.monotonic())
        return real(parts)

    monkeypatch.setattr(siblings, "checksum", slow)
    channel, node = connect(holder.weights_address, SECRET, "sibling", TIMEOUT_S), Node(holder)
    channel.send(FETCH, [1, FIRST_LAYER, 0])
    hidden, ids, _ = drawn_tokens(3)
    for call_id in range(3):
        node.say(call_id, hidden, ids)
        node.hear(ids.numel())
    assert not told_s
    assert channel.receive(TIMEOUT_S).kind == WEIGHTS and len(told_s) == 1
    channel.close()
    node.channel.close()


def test_no_gpu_is_joined_to_another_for_a_fetch(shard_at, monkeypatch):
    opened = []
    monkeypatch.setitem(LINKS, "nccl", StandInLink)
    monkeypatch.setattr(StandInLink, "open", lambda *given: opened.append(given))
    holder, new = (shard_at(name, "nccl://127.0.0.1:0") for name in ("old", "new"))
    holder.adopt(placed_on(holder))
    holder.start()
    in_force, placement = grown(holder, new)
    new.adopt(placement, in_force=in_force, alive={"old", "new"})
    assert new.report().fetched_count == LAYERS * EXPERTS // 2 and not opened


def test_sources_are_the_other_homes():
    shards = [ShardAddress(name, f"memory://{name}", "", f"memory://{name}-weights") for name in "ab"]
    placement = even_placement(shards, FIRST_LAYER, LAYERS, EXPERTS, 1)
    sources = sources_of([(FIRST_LAYER, 0), (FIRST_LAYER, EXPERTS - 1)], placement, {"b"})
    assert sources == {(FIRST_LAYER, 0): [], (FIRST_LAYER, EXPERTS - 1): ["memory://b-weights"]}
