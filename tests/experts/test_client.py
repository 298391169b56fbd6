"""RemoteExperts gives the bits of LocalExperts, by way of shards that come, go, refuse and fall silent."""

import tempfile
import threading
import time
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts import client
from experts.client import RemoteExperts, only_needed
from experts.config import DispatchConfig
from experts.errors import ExpertsUnavailable
from experts.local import LocalExperts
from experts.messages import COMBINE, DISPATCH_BOUNDS_S, REFUSED, Placement
from experts.shard import ExpertShard
from kernels.transport.endpoint import Endpoint
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel
from tests.experts.dispatches import CHOICES, SECRET, drawn_tokens, memory_address, placed

TIMEOUT_S = 10.0
SOON_S = 0.3
LATE_S = 0.2


class ScriptedShard:
    """Collects dispatches in a thread of its own, and answers as a test says."""

    def __init__(self):
        self.address = memory_address()
        self.frames: list[tuple[StreamChannel, Frame]] = []
        self.closed_count = 0
        self.came = threading.Condition()
        self.script = lambda channel, frame, number: None
        self.endpoint = Endpoint(self.address, SECRET, "scripted", self._on_frame, self._on_closed)
        self.endpoint.start()

    def refuse(self, channel: StreamChannel, frame: Frame) -> None:
        """Send a refusal."""
        channel.send(REFUSED, [frame.body[0], "not today"])

    def answer(self, channel: StreamChannel, frame: Frame, value: float = 1.0, more_bytes: int = 0) -> None:
        """Send outputs that are all the same number."""
        slots_count = sum(frame.body[5])
        outputs = torch.full((slots_count, 128), value).numpy().tobytes() + b"x" * more_bytes
        channel.send(COMBINE, [frame.body[0]], [memoryview(outputs)])

    def wait_for(self, frames_count: int) -> None:
        """Wait until so many dispatches have come."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.frames) >= frames_count, TIMEOUT_S)

    def _on_frame(self, channel: StreamChannel, frame: Frame) -> None:
        with self.came:
            self.frames.append((channel, frame))
            self.came.notify_all()
        self.script(channel, frame, len(self.frames))

    def _on_closed(self, channel: StreamChannel) -> None:
        with self.came:
            self.closed_count += 1
            self.came.notify_all()


@pytest.fixture
def scripted():
    """One scripted shard."""
    shard = ScriptedShard()
    yield shard
    shard.endpoint.close()


@pytest.fixture
def remote_with():
    """Makes plugs that go by a placement, and closes them in the end."""
    plugs: list[RemoteExperts] = []

    def make(
        placement: Placement | None, timeout_s: float = TIMEOUT_S, secret: str = SECRET
    ) -> RemoteExperts:
        plugs.append(RemoteExperts(DispatchConfig("node", secret, timeout_s)))
        if placement is not None:
            plugs[-1].adopt(placement)
        return plugs[-1]

    yield make
    for plug in plugs:
        plug.close()


@pytest.fixture
def sockets():
    """A folder whose name is short enough for unix sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def group_of(shard_at, sockets):
    """Starts shards by number, all adopting the even placement."""

    def make(
        count: int, scheme: str = "memory", dtype: torch.dtype = torch.float32, epoch: int = 1
    ) -> Placement:
        shards: list[ExpertShard] = []
        for index in range(count):
            address = memory_address() if scheme == "memory" else f"unix://{sockets}/{index}"
            shards.append(shard_at(f"shard-{index}", address, dtype))
        placement = placed({shard.config.name: shard.address for shard in shards}, epoch)
        for shard in shards:
            shard.adopt(placement)
            shard.start()
        return placement

    return make


def later(*actions) -> threading.Thread:
    """Do something after a while, in another thread."""

    def run():
        time.sleep(LATE_S)
        for action in actions:
            action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("scheme", ["memory", "unix"])
@pytest.mark.parametrize("shards_count", [1, 2, 3, 5])
def test_shards_give_the_bits_of_one_process(group_of, remote_with, local, shards_count, scheme):
    remote = remote_with(group_of(shards_count, scheme))
    for layer in (1, 2):
        for tokens_count in (1, 3, 32):
            tokens = drawn_tokens(tokens_count)
            mixed = remote.dispatch(layer, *tokens).combine()
            assert mixed.dtype == torch.float32
            assert torch.equal(mixed, local.dispatch(layer, *tokens).combine())
    assert remote.retries_count == 0


def test_in_bfloat16_too(checkpoint, group_of, remote_with):
    truth = LocalExperts.from_checkpoint(checkpoint, torch.bfloat16)
    remote = remote_with(group_of(3, dtype=torch.bfloat16))
    tokens = drawn_tokens(9, torch.bfloat16)
    assert torch.equal(remote.dispatch(1, *tokens).combine(), truth.dispatch(1, *tokens).combine())


def test_calls_may_be_combined_in_any_order(group_of, remote_with, local):
    remote = remote_with(group_of(2))
    tokens = [drawn_tokens(count) for count in (4, 7, 1)]
    calls = [remote.dispatch(layer, *some) for layer, some in zip((1, 2, 1), tokens, strict=True)]
    for index in (2, 0, 1):
        expected = local.dispatch((1, 2, 1)[index], *tokens[index]).combine()
        assert torch.equal(calls[index].combine(), expected)


def test_a_report_counts_what_was_answered_and_what_was_given_up(group_of, remote_with):
    remote = remote_with(group_of(2))
    calls = [remote.dispatch(layer, *drawn_tokens(4)) for layer in (1, 2)]
    time.sleep(0.02)
    for call in calls:
        call.combine()
    report = remote.report()
    assert sum(report.counts) == 2 and sum(report.counts[: bisect_left(DISPATCH_BOUNDS_S, 0.02)]) == 0
    assert report.took_s >= 0.04 > report.waited_s > 0
    assert (report.retries_count, report.given_up_count) == (0, 0)
    lost = remote_with(None, timeout_s=SOON_S)
    with pytest.raises(ExpertsUnavailable):
        lost.dispatch(1, *drawn_tokens(4)).combine()
    assert (sum(lost.report().counts), lost.report().given_up_count) == (0, 1)


def test_frames_larger_than_any_buffer_do_not_block_each_other(group_of, remote_with, local):
    """Two micro-batches of 2 MB to each shard, and twice as much back from each."""
    remote = remote_with(group_of(2, "unix"))
    tokens = [drawn_tokens(4096), drawn_tokens(4096)]
    calls = [remote.dispatch(1, *some) for some in tokens]
    for call, some in zip(calls, tokens, strict=True):
        assert torch.equal(call.combine(), local.dispatch(1, *some).combine())


def test_several_nodes_at_once_get_their_own_bits(group_of, remote_with, local):
    placement = group_of(2)
    wrong: list[str] = []

    def work(remote: RemoteExperts, seed: int):
        generator = torch.Generator().manual_seed(seed)
        for round_ in range(15):
            hidden = torch.randn(1 + round_ % 4, 128, generator=generator)
            ids = torch.stack([torch.randperm(16, generator=generator)[:CHOICES] for _ in hidden])
            weights = torch.rand(len(hidden), CHOICES, generator=generator)
            mixed = remote.dispatch(1, hidden, ids, weights).combine()
            if not torch.equal(mixed, truth(hidden, ids, weights)):
                wrong.append(f"node {seed}, round {round_}")

    lock = threading.Lock()

    def truth(*tokens: torch.Tensor) -> torch.Tensor:
        with lock:
            return local.dispatch(1, *tokens).combine()

    threads = [threading.Thread(target=work, args=(remote_with(placement), seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shards_get_only_the_tokens_they_need():
    hidden = torch.randn(10, 4)
    assert torch.equal(only_needed(hidden, torch.tensor([2, 7])), hidden[[2, 7]])
    assert only_needed(hidden, torch.arange(10)) is hidden


def test_a_shard_that_comes_back_elsewhere_is_found_there(group_of, shard_at, remote_with, local):
    """It goes with two calls outstanding; both are sent anew, to its new address."""
    first = shard_at("a", memory_address())
    second = shard_at("b", memory_address())
    placement = placed({"a": first.address, "b": second.address})
    first.adopt(placement)
    second.adopt(placement)
    second.start()
    remote = remote_with(placement)
    tokens = [drawn_tokens(5), drawn_tokens(6)]
    calls = [remote.dispatch(1, *some) for some in tokens]
    first.close()  # it never computed anything
    again = shard_at("a", memory_address())
    moved = placed({"a": again.address, "b": second.address}, epoch=2)
    thread = later(
        lambda: again.adopt(moved), lambda: second.adopt(moved), again.start, lambda: remote.adopt(moved)
    )
    for call, some in zip(calls, tokens, strict=True):
        assert torch.equal(call.combine(), local.dispatch(1, *some).combine())
    thread.join()
    assert remote.epoch == 2 and remote.retries_count > 1


def test_a_shard_restarted_at_its_address_is_found_again(shard_at, remote_with, local, sockets):
    address = f"unix://{sockets}/one"
    placement = placed({"one": address})
    shard = shard_at("one", address)
    shard.adopt(placement)
    shard.start()
    remote = remote_with(placement)
    tokens = drawn_tokens(5)
    expected = local.dispatch(1, *tokens).combine()
    assert torch.equal(remote.dispatch(1, *tokens).combine(), expected)
    shard.close()

    def restart():
        again = shard_at("one", address)
        again.adopt(placement)
        again.start()

    thread = later(restart)
    assert torch.equal(remote.dispatch(1, *tokens).combine(), expected)
    thread.join()


def test_a_shard_that_is_behind_is_asked_again(shard_at, remote_with, local):
    ahead, behind = shard_at("a", memory_address()), shard_at("b", memory_address())
    placement = placed({"a": ahead.address, "b": behind.address}, epoch=2)
    behind.adopt(placed({"a": ahead.address, "b": behind.address}, epoch=1))
    ahead.adopt(placement)
    ahead.start()
    behind.start()
    remote = remote_with(placement)
    tokens = drawn_tokens(5)
    call = remote.dispatch(1, *tokens)
    thread = later(lambda: behind.adopt(placement))
    assert torch.equal(call.combine(), local.dispatch(1, *tokens).combine())
    thread.join()
    assert remote.retries_count >= 1 and behind.report().refused_count == remote.retries_count


def test_a_placement_that_changes_between_dispatch_and_combine_harms_nothing(group_of, remote_with, local):
    remote = remote_with(group_of(3))
    tokens = drawn_tokens(8)
    call = remote.dispatch(2, *tokens)
    remote.adopt(group_of(2, epoch=2))
    assert torch.equal(call.combine(), local.dispatch(2, *tokens).combine())
    assert torch.equal(remote.dispatch(2, *tokens).combine(), local.dispatch(2, *tokens).combine())
    assert remote.retries_count == 0


def test_an_older_placement_is_not_gone_back_to(remote_with):
    remote = remote_with(placed({"a": "memory://a"}, epoch=5))
    remote.adopt(placed({"b": "memory://b"}, epoch=4))
    assert remote.epoch == 5


def test_a_placement_may_come_after_the_dispatch(group_of, remote_with, local):
    remote = remote_with(None)
    assert remote.epoch == 0
    tokens = drawn_tokens(3)
    placement = group_of(2)
    thread = later(lambda: remote.adopt(placement))
    assert torch.equal(remote.dispatch(1, *tokens).combine(), local.dispatch(1, *tokens).combine())
    thread.join()


def test_channels_to_shards_that_left_are_closed(group_of, scripted, remote_with):
    scripted.script = lambda channel, frame, _: scripted.answer(channel, frame)
    remote = remote_with(placed({"old": scripted.address}))
    tokens = drawn_tokens(3)
    remote.dispatch(1, *tokens).combine()
    remote.adopt(group_of(1, epoch=2))
    remote.dispatch(1, *tokens).combine()
    with scripted.came:
        assert scripted.came.wait_for(lambda: scripted.closed_count == 1, TIMEOUT_S)


def test_a_refusal_of_one_call_does_not_touch_the_other(scripted, remote_with):
    """The second call is refused while the first is waited for, on the same channel."""
    remote = remote_with(placed({"one": scripted.address}))
    calls = [remote.dispatch(1, *drawn_tokens(2)) for _ in range(2)]
    scripted.wait_for(2)
    first, second = scripted.frames
    scripted.refuse(*second)
    scripted.answer(*first)
    scripted.script = lambda channel, frame, _: scripted.answer(channel, frame, value=2.0)
    assert torch.allclose(calls[0].combine(), calls[0].expert_weights.sum(1, keepdim=True).expand(2, 128))
    assert remote.retries_count == 0
    assert torch.allclose(calls[1].combine(), 2 * calls[1].expert_weights.sum(1, keepdim=True).expand(2, 128))
    assert remote.retries_count == 1 and len(scripted.frames) == 3


def test_what_no_answer_could_hold_goes_in_pieces(group_of, remote_with, local, monkeypatch):
    """As if one shard had all slots; two pieces at a time are on their way."""
    monkeypatch.setattr(client, "ANSWER_BYTES_MAX", 4 * CHOICES * 128 * 4 + 7)
    remote = remote_with(group_of(1))
    dispatch, tokens, outstanding = remote._send, drawn_tokens(10), []
    monkeypatch.setattr(
        remote, "_send", lambda call: outstanding.append(len(remote._parts)) or dispatch(call)
    )
    assert torch.equal(remote.dispatch(1, *tokens).combine(), local.dispatch(1, *tokens).combine())
    assert outstanding == [0, 1, 1] and remote.retries_count == 0
    remote.dispatch(1, *drawn_tokens(4)).combine()
    assert len(outstanding) == 4


def test_nothing_is_dispatched_after_the_end(scripted, remote_with):
    remote = remote_with(placed({"one": scripted.address}))
    remote.dispatch(1, *drawn_tokens(2))
    scripted.wait_for(1)
    remote.close()
    begin_s = time.monotonic()
    with pytest.raises(ExpertsUnavailable, match="closing"):
        remote.dispatch(1, *drawn_tokens(2)).combine()
    assert time.monotonic() - begin_s < TIMEOUT_S / 2 and len(scripted.frames) == 1
    with scripted.came:
        assert scripted.came.wait_for(lambda: scripted.closed_count == 1, TIMEOUT_S)


def test_a_plug_may_be_closed_while_it_connects(scripted, remote_with):
    """The computing thread reaches a further shard just then."""
    remote = remote_with(placed({"one": scripted.address}))
    remote.dispatch(1, *drawn_tokens(2))
    [channel] = remote._channels.values()
    end = channel.end

    def late() -> None:
        remote._channels["another"] = channel
        end()

    channel.end = late
    remote.close()
    assert channel.fileno() == -1


def test_an_answer_to_a_call_that_was_given_up_is_dropped(scripted, remote_with):
    remote = remote_with(placed({"one": scripted.address}))
    remote.dispatch(1, *drawn_tokens(2))  # nobody waits for it, as when another micro-batch failed
    call = remote.dispatch(1, *drawn_tokens(2))
    scripted.wait_for(2)
    scripted.answer(*scripted.frames[0], value=9.0)
    scripted.answer(*scripted.frames[1])
    assert torch.allclose(call.combine(), call.expert_weights.sum(1, keepdim=True).expand(2, 128))
    assert remote.retries_count == 0 and not remote._parts


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(lambda shard, channel, frame: shard.answer(channel, frame, more_bytes=4), id="too long"),
        pytest.param(lambda shard, channel, frame: channel.send(COMBINE, [frame.body[0]]), id="empty"),
        pytest.param(lambda shard, channel, frame: channel.send(COMBINE, None), id="no body"),
        pytest.param(lambda shard, channel, frame: channel.send(REFUSED, {"why": 1}), id="no call"),
        pytest.param(lambda shard, channel, frame: channel.send("surprise", [frame.body[0]]), id="kind"),
        pytest.param(lambda shard, channel, frame: channel.close(), id="goodbye"),
    ],
)
def test_an_answer_of_no_use_is_asked_for_again(scripted, remote_with, garbage):
    def script(channel: StreamChannel, frame: Frame, number: int):
        if number == 1:
            garbage(scripted, channel, frame)
        else:
            scripted.answer(channel, frame)

    scripted.script = script
    call = remote_with(placed({"one": scripted.address})).dispatch(1, *drawn_tokens(2))
    assert torch.allclose(call.combine(), call.expert_weights.sum(1, keepdim=True).expand(2, 128))


def test_nothing_is_sent_for_a_call_of_which_one_shard_cannot_be_reached(scripted, remote_with):
    remote = remote_with(placed({"a": scripted.address, "b": "memory://nobody at home"}), SOON_S)
    with pytest.raises(ExpertsUnavailable, match="nobody listens at memory://nobody at home"):
        remote.dispatch(1, *drawn_tokens(20)).combine()
    assert scripted.frames == [] and remote.retries_count > 1


def test_silence_is_named(scripted, remote_with):
    call = remote_with(placed({"one": scripted.address}), SOON_S).dispatch(2, *drawn_tokens(2))
    with pytest.raises(ExpertsUnavailable, match=r"layer 2: no answer within 0\.3 s: no whole frame came"):
        call.combine()


def test_refusals_without_end_are_named(scripted, remote_with):
    scripted.script = lambda channel, frame, _: scripted.refuse(channel, frame)
    call = remote_with(placed({"one": scripted.address}), SOON_S).dispatch(1, *drawn_tokens(2))
    with pytest.raises(ExpertsUnavailable, match="not today"):
        call.combine()


def test_no_placement_is_named(remote_with):
    with pytest.raises(ExpertsUnavailable, match="no placement of experts is known yet"):
        remote_with(None, SOON_S).dispatch(1, *drawn_tokens(2))


def test_a_wrong_secret_never_gets_an_answer(group_of, remote_with):
    remote = remote_with(group_of(1), SOON_S, secret="another")
    with pytest.raises(ExpertsUnavailable):
        remote.dispatch(1, *drawn_tokens(2)).combine()


def test_after_a_failure_the_next_call_goes_through(scripted, remote_with):
    remote = remote_with(placed({"one": scripted.address}), SOON_S)
    with pytest.raises(ExpertsUnavailable):
        remote.dispatch(1, *drawn_tokens(2)).combine()
    scripted.script = lambda channel, frame, _: scripted.answer(channel, frame)
    call = remote.dispatch(1, *drawn_tokens(2))
    assert torch.allclose(call.combine(), call.expert_weights.sum(1, keepdim=True).expand(2, 128))


def replicated(shards: dict[str, str], epoch: int = 1) -> Placement:
    """Every expert on every shard."""
    even = placed(shards, epoch)
    everywhere = tuple(range(len(shards)))
    return replace(even, homes=tuple(tuple(everywhere for _ in homes) for homes in even.homes))


def test_replicas_on_several_shards_change_no_bit(shard_at, remote_with, local):
    shards = [shard_at(name, memory_address()) for name in "abc"]
    placement = replicated({shard.config.name: shard.address for shard in shards})
    for shard in shards:
        shard.adopt(placement)
        shard.start()
    remote = remote_with(placement)
    for tokens_count in (1, 2, 9, 64):
        tokens = drawn_tokens(tokens_count)
        assert torch.equal(remote.dispatch(2, *tokens).combine(), local.dispatch(2, *tokens).combine())
    slots = [shard.report().slots_count for shard in shards]
    assert max(slots) - min(slots) <= 4, "one batch after the other is shared evenly"


def test_who_has_a_second_home_does_not_wait_for_a_dead_shard(shard_at, remote_with, local):
    shards = {name: shard_at(name, memory_address()) for name in "ab"}
    placement = replicated({name: shard.address for name, shard in shards.items()})
    for shard in shards.values():
        shard.adopt(placement)
    shards["b"].start()
    remote = remote_with(placement)
    tokens = drawn_tokens(8)
    call = remote.dispatch(1, *tokens)
    begin_s = time.monotonic()
    shards["a"].close()  # its part of the call is lost with it
    assert torch.equal(call.combine(), local.dispatch(1, *tokens).combine())
    assert torch.equal(remote.dispatch(1, *tokens).combine(), local.dispatch(1, *tokens).combine())
    assert remote.retries_count == 1, "the shard that failed is passed over for a while"
    assert time.monotonic() - begin_s < TIMEOUT_S / 2


def test_who_has_a_second_home_does_not_wait_for_a_silent_shard(shard_at, scripted, local):
    good = shard_at("b", memory_address())
    placement = replicated({"a": scripted.address, "b": good.address})
    good.adopt(placement)
    good.start()
    remote = RemoteExperts(DispatchConfig("node", SECRET, TIMEOUT_S, silence_s=SOON_S))
    remote.adopt(placement)
    tokens = drawn_tokens(8)
    begin_s = time.monotonic()
    assert torch.equal(remote.dispatch(1, *tokens).combine(), local.dispatch(1, *tokens).combine())
    assert SOON_S <= time.monotonic() - begin_s < TIMEOUT_S / 2
    remote.close()


def test_a_silent_shard_without_a_second_home_is_waited_for(scripted):
    remote = RemoteExperts(DispatchConfig("node", SECRET, TIMEOUT_S, silence_s=0.05))
    remote.adopt(placed({"one": scripted.address}))
    call = remote.dispatch(1, *drawn_tokens(2))
    scripted.wait_for(1)
    later(lambda: scripted.answer(*scripted.frames[0]))
    call.combine()
    assert remote.retries_count == 0
    remote.close()


def test_two_shards_that_are_slow_are_not_asked_in_turns_for_ever():
    """Both need longer than silence is borne; the second is waited for."""
    first, second = ScriptedShard(), ScriptedShard()
    placement = replicated({"a": first.address, "b": second.address})
    remote = RemoteExperts(DispatchConfig("node", SECRET, TIMEOUT_S, silence_s=0.1))
    remote.adopt(placement)
    for shard in (first, second):

        def slowly(channel, frame, number, shard=shard) -> None:
            if number == 1:
                time.sleep(0.3)
            shard.answer(channel, frame)

        shard.script = slowly
    remote.dispatch(1, *drawn_tokens(8)).combine()
    assert remote.retries_count == 1
    remote.close()
    first.endpoint.close()
    second.endpoint.close()


def test_a_hung_shard_is_left_as_soon_as_its_experts_are_elsewhere(shard_at, scripted, local):
    """It alone held them; while a node waits, a newer placement gives them to another."""
    good = shard_at("b", memory_address())
    moved = placed({"b": good.address}, epoch=2)
    good.adopt(moved)
    good.start()
    remote = RemoteExperts(DispatchConfig("node", SECRET, TIMEOUT_S, silence_s=SOON_S))
    remote.adopt(placed({"a": scripted.address}))
    tokens = drawn_tokens(8)
    call = remote.dispatch(1, *tokens)
    thread = later(lambda: remote.adopt(moved))
    begin_s = time.monotonic()
    assert torch.equal(call.combine(), local.dispatch(1, *tokens).combine())
    assert time.monotonic() - begin_s < TIMEOUT_S / 2
    thread.join()
    remote.close()


def test_a_shard_that_takes_no_bytes_is_left_where_another_holds_all(shard_at, sockets, local):
    """Its socket is there, but nobody reads: more than the socket holds can never be sent."""
    deaf = Endpoint(f"unix://{sockets}/deaf", SECRET, "deaf", lambda channel, frame: None)
    good = shard_at("b", memory_address())
    placement = replicated({"a": deaf.address, "b": good.address})
    good.adopt(placement)
    good.start()
    remote = RemoteExperts(DispatchConfig("node", SECRET, TIMEOUT_S, silence_s=SOON_S))
    remote.adopt(placement)
    greeter = threading.Timer(LATE_S, lambda: deaf.poll(0.1))  # takes the hello, and reads no more
    greeter.start()
    tokens = drawn_tokens(20_000)
    begin_s = time.monotonic()
    assert torch.equal(remote.dispatch(1, *tokens).combine(), local.dispatch(1, *tokens).combine())
    assert time.monotonic() - begin_s < TIMEOUT_S
    greeter.join()
    remote.close()
    deaf.close()


def test_a_shard_that_refuses_is_left_where_another_holds_all(shard_at, scripted, local, monkeypatch):
    monkeypatch.setattr(client, "BEHIND_S", 0.2)
    scripted.script = lambda channel, frame, _: scripted.refuse(channel, frame)
    good = shard_at("b", memory_address())
    placement = replicated({"a": scripted.address, "b": good.address})
    good.adopt(placement)
    good.start()
    remote = RemoteExperts(DispatchConfig("node", SECRET, TIMEOUT_S))
    remote.adopt(placement)
    tokens = drawn_tokens(8)
    assert torch.equal(remote.dispatch(1, *tokens).combine(), local.dispatch(1, *tokens).combine())
    assert remote.retries_count == 1 and len(scripted.frames) == 1
    time.sleep(1.2 * client.BEHIND_S)
    remote.dispatch(1, *tokens).combine()
    assert len(scripted.frames) == 2, "it was only behind, most likely, and is soon asked again"
    remote.close()
