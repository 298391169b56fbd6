"""Tokens to experts and back from GPU to GPU, over a link that stands in for NCCL: one process's bits."""

import time
from collections.abc import Callable

import pytest
import torch

from experts import client
from experts.client import RemoteExperts
from experts.config import DispatchConfig
from experts.messages import Placement
from kernels.transport.connect import LINKS
from tests.experts.dispatches import SECRET, drawn_tokens, placed
from tests.experts.test_client import replicated
from tests.kernels.transport.stand_in_link import Behaviour, StandInLink

SILENCE_S = 0.2


def serving(shard_at: Callable, place: Callable[[dict[str, str]], Placement]) -> Placement:
    """The placement of two shards that serve from GPU to GPU, as `place` makes it of their addresses."""
    shards = {name: shard_at(name, "nccl://127.0.0.1:0") for name in "ab"}
    placement = place({name: shard.address for name, shard in shards.items()})
    for shard in shards.values():
        shard.adopt(placement)
        shard.start()
    return placement


@pytest.fixture
def remote(shard_at, monkeypatch):
    """Two shards, reached from GPU to GPU."""
    monkeypatch.setitem(LINKS, "nccl", StandInLink)
    monkeypatch.setattr(StandInLink, "joints", {})
    placement = serving(shard_at, lambda addresses: placed(addresses, 1))
    plug = RemoteExperts(DispatchConfig("node", SECRET, timeout_s=10.0))
    plug.adopt(placement)
    yield plug
    plug.close()


def test_shards_give_the_bits_of_one_process(remote, local):
    for tokens_count in (1, 3, 32):
        tokens = drawn_tokens(tokens_count)
        mixed = remote.dispatch(1, *tokens).combine()
        assert torch.equal(mixed, local.dispatch(1, *tokens).combine())
    assert remote.retries_count == 0
    assert all(channel.carries_tensors for channel in remote._channels.values()) and remote._channels


def test_calls_of_two_lanes_may_be_combined_in_any_order(remote, local):
    tokens = [drawn_tokens(count) for count in (4, 7, 1)]
    calls = [remote.dispatch(layer, *some) for layer, some in zip((1, 2, 1), tokens, strict=True)]
    for index in (2, 0, 1):
        expected = local.dispatch((1, 2, 1)[index], *tokens[index]).combine()
        assert torch.equal(calls[index].combine(), expected)


class SlowLink(StandInLink):
    """Joins only when silence would long have been taken for death."""

    def open(self, confirmed, tell):
        time.sleep(3 * SILENCE_S)
        super().open(confirmed, tell)


def test_a_shard_whose_gpu_is_being_joined_is_not_silent(shard_at, local, monkeypatch):
    monkeypatch.setitem(LINKS, "nccl", SlowLink)
    monkeypatch.setattr(StandInLink, "joints", {})
    placement = serving(shard_at, replicated)
    plug = RemoteExperts(DispatchConfig("node", SECRET, timeout_s=10.0, silence_s=SILENCE_S))
    plug.adopt(placement)
    tokens = drawn_tokens(8)
    call = plug.dispatch(1, *tokens)
    first = dict(plug._channels)
    assert torch.equal(call.combine(), local.dispatch(1, *tokens).combine())
    assert plug.retries_count == 0 and plug._channels == first
    plug.close()


def test_a_join_that_hangs_costs_silence_and_not_the_call(shard_at, local, monkeypatch):
    """Of two shards that hold everything, one never comes to the end of joining its GPU."""
    behaviour = Behaviour(opening_hangs=True)
    monkeypatch.setitem(LINKS, "nccl", StandInLink)
    monkeypatch.setattr(StandInLink, "joints", {})
    monkeypatch.setattr(client, "JOIN_S", SILENCE_S)
    placement = serving(shard_at, replicated)
    plug = RemoteExperts(DispatchConfig("node", SECRET, timeout_s=4.0, silence_s=SILENCE_S))
    plug.adopt(placement)
    links = iter([StandInLink(behaviour)])  # and then others
    monkeypatch.setitem(LINKS, "nccl", lambda: next(links, None) or StandInLink())
    tokens = drawn_tokens(8)
    begin_s = time.monotonic()
    assert torch.equal(plug.dispatch(1, *tokens).combine(), local.dispatch(1, *tokens).combine())
    assert plug.retries_count and time.monotonic() - begin_s < 2.0
    behaviour.opening_hangs = False
    plug.close()


def test_all_channels_end_before_one_is_waited_for():
    class Told:
        def end(self):
            told.append("end")

        def close(self):
            told.append("close")

    told: list[str] = []
    plug = RemoteExperts(DispatchConfig("node", SECRET))
    plug._channels = {"a": Told(), "b": Told()}
    plug.close()
    assert told == ["end", "end", "close", "close"]


def test_a_shard_refuses_an_epoch_that_it_has_not_loaded(remote, local):
    tokens = drawn_tokens(5)
    remote._route.epoch = 2
    remote.config = DispatchConfig("node", SECRET, timeout_s=0.2)
    with pytest.raises(Exception, match="epoch 2 is not here yet"):
        remote.dispatch(1, *tokens).combine()
