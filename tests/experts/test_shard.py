"""A shard: computes what nodes send, together or one by one, and survives what nobody should send."""

import threading
import time

import pytest
import torch

import experts.shard
from experts.load import RecentLoad
from experts.messages import COMBINE, DISPATCH, REFUSED, DispatchHeader, Placement, ShardAddress
from experts.shard import ExpertShard
from kernels.ops.sort_by_expert import sort_by_expert
from kernels.transport.connect import connect
from kernels.transport.errors import ChannelError
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import as_bytes, from_bytes
from tests.experts.dispatches import CHOICES, EXPERTS, HIDDEN, SECRET, drawn_tokens, memory_address, placed

WAIT_S = 5.0


class Node:
    """What a node says to one shard, and what it hears."""

    def __init__(self, shard: ExpertShard, name: str = "node"):
        self.shard = shard
        self.channel: StreamChannel = connect(shard.address, SECRET, name)

    def say(self, call_id: int, hidden, ids, layer: int = 1, epoch: int = 1) -> None:
        """Send a dispatch of all slots to this one shard."""
        self.order, present, counts = sort_by_expert(ids)
        rows = (self.order // ids.shape[1]).to(torch.int32)
        header = DispatchHeader(call_id, epoch, layer, len(hidden), tuple(present), tuple(counts))
        self.channel.send(DISPATCH, header.body(), [as_bytes(hidden), as_bytes(rows)])

    def hear(self, slots_count: int = 0) -> torch.Tensor | str:
        """The next answer: outputs of the slots in the order of the dispatch, or why it was refused."""
        frame = self.channel.receive(WAIT_S) if self.shard.is_alive else self._next_frame()
        if frame.kind == REFUSED:
            return frame.body[1]
        assert frame.kind == COMBINE
        outputs = from_bytes(frame.parts[0], torch.float32, (slots_count, HIDDEN))
        by_slot = torch.empty_like(outputs)
        by_slot[self.order] = outputs
        return by_slot

    def _next_frame(self) -> Frame:
        """Move a shard without a thread until it has answered."""
        end_s = time.monotonic() + WAIT_S
        while (frame := self.channel.receive_ready()) is None:
            assert time.monotonic() < end_s, "no answer"
            self.shard.step(0.01)
        return frame


def outputs_of(local, layer: int, hidden, ids) -> torch.Tensor:
    """Each slot's output by LocalExperts, one choice at a time."""
    one = torch.ones(len(hidden), 1)
    by_choice = [local.dispatch(layer, hidden, ids[:, i : i + 1], one).combine() for i in range(ids.shape[1])]
    return torch.stack(by_choice, dim=1).flatten(0, 1)


def step_until(shard: ExpertShard, dispatches_count: int) -> None:
    """Let the shard take so many dispatches, in as many steps as it needs."""
    end_s = time.monotonic() + WAIT_S
    while dispatches_count > 0 and time.monotonic() < end_s:
        dispatches_count -= shard.step(0.05)
    assert dispatches_count == 0


@pytest.fixture
def shard(shard_at) -> ExpertShard:
    """A shard with all experts that moves when it is told to."""
    shard = shard_at("one", memory_address())
    shard.adopt(placed({"one": shard.address}))
    return shard


@pytest.fixture
def node_of():
    """Makes nodes, and closes their channels in the end."""
    nodes: list[Node] = []

    def make(shard: ExpertShard, name: str = "node") -> Node:
        nodes.append(Node(shard, name))
        return nodes[-1]

    yield make
    for node in nodes:
        node.channel.close()


@pytest.fixture
def node(shard, node_of) -> Node:
    """A node of the shard."""
    return node_of(shard)


@pytest.fixture
def other(shard, node_of) -> Node:
    """Another node."""
    return node_of(shard, "other")


def test_a_dispatch_is_answered(shard, node, local):
    hidden, ids, _ = drawn_tokens(6)
    node.say(1, hidden, ids)
    step_until(shard, 1)
    assert torch.equal(node.hear(6 * CHOICES), outputs_of(local, 1, hidden, ids))


def test_nodes_that_wait_for_one_layer_are_computed_together_to_the_same_bits(
    shard, node_of, local, monkeypatch
):
    nodes = [node_of(shard, f"node-{index}") for index in range(3)]
    tokens = [drawn_tokens(count) for count in (5, 1, 32)]
    calls = []
    real = experts.shard.expert_mlp
    monkeypatch.setattr(experts.shard, "expert_mlp", lambda *given: calls.append(given) or real(*given))
    shard.step(0)
    for node, (hidden, ids, _) in zip(nodes, tokens, strict=True):
        node.say(7, hidden, ids)
    assert shard.step(WAIT_S) == 3
    assert len(calls) == 1 and len(calls[0][0]) == 38, "one call for all three"
    for node, (hidden, ids, _) in zip(nodes, tokens, strict=True):
        assert torch.equal(node.hear(ids.numel()), outputs_of(local, 1, hidden, ids))
    assert shard.report().dispatches_count == 3 and shard.report().slots_count == 38 * CHOICES
    assert shard.report().busy_s > 0


def test_layers_are_computed_apart(shard, node, other, local):
    tokens = [drawn_tokens(3), drawn_tokens(4)]
    shard.step(0)
    node.say(1, *tokens[0][:2], layer=1)
    other.say(1, *tokens[1][:2], layer=2)
    step_until(shard, 2)
    assert torch.equal(node.hear(12), outputs_of(local, 1, *tokens[0][:2]))
    assert torch.equal(other.hear(16), outputs_of(local, 2, *tokens[1][:2]))


def test_what_does_not_fit_is_refused_and_the_channel_stays(shard_at, node_of, local):
    shard = shard_at("a", memory_address())
    node = node_of(shard)
    hidden, ids, _ = drawn_tokens(2)
    ids = ids % 8  # the first of two shards has the first eight; a token may choose one twice
    node.say(1, hidden, ids)
    assert node.hear() == "epoch 1 is not here yet, 0 is"
    shard.adopt(placed({"a": shard.address, "b": "memory://nobody"}))
    node.say(2, hidden, ids + 8)
    assert node.hear() == f"expert {int(ids.min()) + 8} of layer 1 is not on this shard"
    node.say(3, hidden, ids, layer=77)
    assert "of layer 77 is not on this shard" in node.hear()
    node.say(4, hidden, ids)
    step_until(shard, 1)
    assert torch.equal(node.hear(8), outputs_of(local, 1, hidden, ids))
    assert shard.report().refused_count == 3 and shard.report().dispatches_count == 1


GOOD_BODY = [1, 1, 1, 2, [0, 1], [1, 3]]  # two tokens, four slots
HIDDEN_BYTES = 2 * HIDDEN * 4


def parts(hidden_bytes: int = HIDDEN_BYTES, rows: tuple[int, ...] = (0, 0, 1, 1)) -> list[memoryview]:
    """Zeros as hidden states, and rows."""
    return [memoryview(bytearray(hidden_bytes)), as_bytes(torch.tensor(rows, dtype=torch.int32))]


MALFORMED = {
    "another kind": ("hello again", GOOD_BODY, parts()),
    "no body": (DISPATCH, None, parts()),
    "a header that is no number": (DISPATCH, [1, 1, 1, float("nan"), [0, 1], [1, 3]], parts()),
    "an expert twice": (DISPATCH, [1, 1, 1, 2, [1, 1], [1, 3]], parts()),
    "a negative expert": (DISPATCH, [1, 1, 1, 2, [-1, 1], [1, 3]], parts()),
    "no parts": (DISPATCH, GOOD_BODY, []),
    "a part too many": (DISPATCH, GOOD_BODY, [*parts(), memoryview(b"more")]),
    "hidden states too short": (DISPATCH, GOOD_BODY, parts(HIDDEN_BYTES - 4)),
    "hidden states too long": (DISPATCH, GOOD_BODY, parts(HIDDEN_BYTES + 4)),
    "hidden states of half a number": (DISPATCH, GOOD_BODY, parts(HIDDEN_BYTES - 1)),
    "no hidden states": (DISPATCH, GOOD_BODY, parts(0)),
    "too few rows": (DISPATCH, GOOD_BODY, parts(rows=(0, 0, 1))),
    "no rows": (DISPATCH, GOOD_BODY, parts(rows=())),
    "a negative row": (DISPATCH, GOOD_BODY, parts(rows=(0, 0, 1, -1))),
    "a row that was not sent": (DISPATCH, GOOD_BODY, parts(rows=(0, 0, 1, 2))),
    "more tokens than memory": (DISPATCH, [1, 1, 1, 2**62, [0, 1], [1, 3]], parts()),
    "more slots than memory": (DISPATCH, [1, 1, 1, 2, [0, 1], [2**62, 2**62]], parts()),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_dispatch_costs_its_sender_the_channel_and_nothing_else(shard, node, other, local, kind):
    hidden, ids, _ = drawn_tokens(4)
    shard.step(0)
    other.say(1, hidden, ids)  # waits in the same step
    node.channel.send(*MALFORMED[kind])
    step_until(shard, 1)
    with pytest.raises(ChannelError):
        node.hear()
    assert torch.equal(other.hear(4 * CHOICES), outputs_of(local, 1, hidden, ids))
    other.say(2, hidden, ids)
    step_until(shard, 1)
    assert torch.equal(other.hear(4 * CHOICES), outputs_of(local, 1, hidden, ids))
    assert shard.report().refused_count == 1


def test_hidden_states_that_are_no_numbers_spoil_only_their_own_tokens(shard, node, other, local):
    sick, healthy = drawn_tokens(4), drawn_tokens(4)
    sick[0][2] = float("nan")
    shard.step(0)
    node.say(1, *sick[:2])
    other.say(1, *healthy[:2])
    step_until(shard, 2)
    assert torch.equal(other.hear(16), outputs_of(local, 1, *healthy[:2]))
    answer = node.hear(16).view(4, CHOICES, HIDDEN)
    assert answer[2].isnan().all() and not answer[[0, 1, 3]].isnan().any()


def test_a_layer_that_fails_is_refused_at_once_and_other_layers_go_on(shard, node, other, local, monkeypatch):
    hidden, ids, _ = drawn_tokens(3)
    real = experts.shard.expert_mlp

    def failing(given, *rest):
        if len(given) == 5:
            raise MemoryError
        return real(given, *rest)

    monkeypatch.setattr(experts.shard, "expert_mlp", failing)
    shard.step(0)
    node.say(1, *drawn_tokens(5)[:2], layer=1)
    other.say(1, hidden, ids, layer=2)
    step_until(shard, 2)
    assert node.hear() == "the shard failed to compute it"
    assert torch.equal(other.hear(12), outputs_of(local, 2, hidden, ids))


def test_a_node_that_did_not_wait_harms_nobody(shard, node, other, local):
    hidden, ids, _ = drawn_tokens(3)
    shard.step(0)
    node.say(1, hidden, ids)
    other.say(1, hidden, ids)
    node.channel.close()
    step_until(shard, 2)
    assert torch.equal(other.hear(12), outputs_of(local, 1, hidden, ids))


def test_an_answer_that_fails_ends_its_channel_and_others_are_answered(
    shard, node, other, local, monkeypatch
):
    real, closed = StreamChannel.send, []

    def failing(channel, kind, body, parts=()):
        if kind == COMBINE and channel.peer == "node":
            channel.closes_at_once = False  # GPUs have yet to let go
            channel.close = lambda: closed.append(1) or StreamChannel.close(channel)
            raise MemoryError("no room for the answer")
        real(channel, kind, body, parts)

    hidden, ids, _ = drawn_tokens(3)
    shard.step(0)
    for one in (node, other):
        one.say(1, hidden, ids)
    monkeypatch.setattr(StreamChannel, "send", failing)
    step_until(shard, 2)
    assert torch.equal(other.hear(12), outputs_of(local, 1, hidden, ids))
    with pytest.raises(ChannelError):
        node.hear()
    assert not closed, "nobody waits for its GPUs here"


def test_kernels_are_compiled_whenever_a_layer_has_more_experts_than_ever(shard_at, monkeypatch):
    shard, counts = shard_at("a", memory_address()), []
    monkeypatch.setattr(shard, "_loaded", lambda missing, *_: dict.fromkeys(missing))
    monkeypatch.setattr(shard, "_compile_for", lambda held: counts.append(len(held)))
    shards = (ShardAddress("a", shard.address), ShardAddress("b", "memory://b"))
    for epoch, here_count in enumerate((0, 3, 40, 2, 40), 1):
        few = tuple((int(expert >= here_count // 2),) for expert in range(64))
        many = tuple((int(expert >= here_count),) for expert in range(64))
        shard.adopt(Placement(epoch, 1, shards, (few, many)))
    assert counts == [3, 40]


def test_the_earlier_placement_works_until_every_node_goes_by_the_newer(shard, node, local):
    hidden, ids, _ = drawn_tokens(3)
    shard.adopt(placed({"one": shard.address, "two": "memory://elsewhere"}, epoch=2))
    assert shard.epoch == 2 and shard.report().experts_count == EXPERTS
    node.say(1, hidden, ids, epoch=1)
    step_until(shard, 1)
    assert torch.equal(node.hear(12), outputs_of(local, 1, hidden, ids)), "experts that leave still answer"
    node.say(2, hidden, ids % 8, epoch=2)
    step_until(shard, 1)
    assert torch.equal(node.hear(12), outputs_of(local, 1, hidden, ids % 8))
    shard.forget(epoch=1)
    node.say(3, hidden, ids % 8 + 8, epoch=1)
    step_until(shard, 1)
    assert torch.equal(node.hear(12), outputs_of(local, 1, hidden, ids % 8 + 8)), "another node is behind"
    shard.forget(epoch=2)
    node.say(4, hidden, ids % 8 + 8, epoch=1)
    assert "is not on this shard" in node.hear()


def test_placements_that_nobody_went_by_do_not_drop_those_in_use(shard, node, local):
    hidden, ids, _ = drawn_tokens(3)
    for epoch, shards in ((2, "ab"), (3, "abcd")):
        shard.adopt(placed({"one": shard.address, **{name: f"memory://{name}" for name in shards}}, epoch))
    node.say(1, hidden, ids, epoch=1)
    step_until(shard, 1)
    assert torch.equal(node.hear(12), outputs_of(local, 1, hidden, ids))


def test_an_older_placement_is_not_adopted(shard):
    for epoch in (0, 1):
        shard.adopt(placed({"somebody else": "memory://elsewhere"}, epoch))
    assert shard.epoch == 1 and shard.report().experts_count == 2 * EXPERTS


def test_placements_may_change_in_another_thread_while_it_serves(shard, node, local):
    """Each dispatch goes by the epoch that the shard has just shown; experts come and go under it."""
    shard.start()
    done = threading.Event()

    def adopting():
        for epoch in range(2, 30):
            names = ("one", "two") if epoch % 2 else ("one",)
            shard.adopt(placed({name: shard.address for name in names}, epoch))
        done.set()

    thread = threading.Thread(target=adopting)
    thread.start()
    hidden, ids, _ = drawn_tokens(3)
    ids = ids % 8  # which stay here in every placement
    expected = outputs_of(local, 1, hidden, ids)
    answers_count = 0
    while not done.is_set() or answers_count < 5:
        node.say(answers_count, hidden, ids, epoch=shard.epoch)
        assert torch.equal(node.hear(12), expected)
        answers_count += 1
    thread.join()


def test_it_reports_what_it_did(shard, node):
    hidden, ids, _ = drawn_tokens(10)
    node.say(1, hidden, ids, layer=2)
    step_until(shard, 1)
    report = shard.report()
    assert (report.name, report.address, report.epoch) == ("one", shard.address, 1)
    assert report.experts_count == 2 * EXPERTS and report.slots_count == 40
    expected = [[0] * EXPERTS, torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()]
    assert RecentLoad(2, EXPERTS, 1.0, 1.0).read("one", report.load).tolist() == expected


def test_it_serves_in_a_thread_until_closed(shard_at, node_of, local):
    shard = shard_at("one", memory_address())
    shard.adopt(placed({"one": shard.address}))
    assert not shard.is_alive
    shard.start()
    assert shard.is_alive
    node = node_of(shard)
    hidden, ids, _ = drawn_tokens(3)
    node.say(1, hidden, ids)
    assert torch.equal(node.hear(12), outputs_of(local, 1, hidden, ids))
    shard.close()
    assert not shard.is_alive
    with pytest.raises(ChannelError):
        node.hear()
    shard.close()  # twice does no harm
