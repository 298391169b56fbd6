"""What a traced dispatch leaves behind, on the node and on the shards, and that others leave nothing."""

import pytest
import torch

from experts.client import RemoteExperts
from experts.config import DispatchConfig
from experts.errors import ExpertsUnavailable
from experts.messages import DispatchHeader
from kernels.transport.spans import Span, begin_trace, place_under, span_id_of, trace_id_of
from tests.experts.dispatches import CHOICES, SECRET, drawn_tokens, memory_address, placed


@pytest.fixture
def group(shard_at):
    """Two shards that serve, their placement, and a plug."""
    shards = [shard_at(f"shard-{index}", memory_address()) for index in range(2)]
    placement = placed({shard.config.name: shard.address for shard in shards})
    for shard in shards:
        shard.adopt(placement)
        shard.start()
    plug = RemoteExperts(DispatchConfig("node", SECRET, 10.0))
    plug.adopt(placement)
    yield plug, shards
    plug.close()


def mixed(plug: RemoteExperts, layer: int, tokens_count: int = 8) -> torch.Tensor:
    """One layer's output of some tokens."""
    hidden, ids, weights = drawn_tokens(tokens_count)
    return plug.dispatch(layer, hidden, ids, weights).combine()


def taken(shards) -> list[Span]:
    """The shards' spans, once they are closed, for they note them after they answer."""
    for shard in shards:
        shard.close()
    return [span for shard in shards for span in shard.spans.take()]


def test_shards_work_under_the_dispatch_of_a_node(group):
    plug, shards = group
    above = place_under(begin_trace())
    plug.trace(above)
    for layer in (1, 2):
        mixed(plug, layer)
    dispatches, work = plug.spans.take(), taken(shards)
    assert [span.name for span in dispatches] == ["dispatch", "dispatch"]
    assert [span.attributes for span in dispatches] == [
        {"trivium.layer": layer, "trivium.tokens_count": 8} for layer in (1, 2)
    ]
    assert {span.parent_id for span in dispatches} == {span_id_of(above)}
    assert {span.trace_id for span in (*dispatches, *work)} == {trace_id_of(above)}
    assert {span.name for span in work} == {"experts"} and len(work) == 4
    by_layer = {span.attributes["trivium.layer"]: span for span in dispatches}
    for span in work:
        dispatch = by_layer[span.attributes["trivium.layer"]]
        assert span.parent_id == dispatch.span_id
        assert dispatch.begin_s - 0.01 <= span.begin_s <= span.end_s <= dispatch.end_s + 0.01
    for layer in (1, 2):
        slots = [
            one.attributes["trivium.slots_count"] for one in work if one.attributes["trivium.layer"] == layer
        ]
        assert sum(slots) == 8 * CHOICES
    assert len({span.span_id for span in (*dispatches, *work)}) == 6


def test_untraced_leaves_nothing(group):
    plug, shards = group
    mixed(plug, 1)
    plug.trace(begin_trace())
    plug.trace("")
    mixed(plug, 1)
    assert plug.spans.take() == [] and taken(shards) == []


def test_a_dispatch_is_under_what_was_traced_when_it_left(group):
    plug, shards = group
    first, second = begin_trace(), begin_trace()
    plug.trace(first)
    call = plug.dispatch(1, *drawn_tokens(4))
    plug.trace(second)
    mixed(plug, 1)
    call.combine()
    traces = [span.trace_id for span in plug.spans.take()]
    assert traces == [trace_id_of(second), trace_id_of(first)]
    assert sorted(span.trace_id for span in taken(shards)) == sorted(2 * traces)


def test_of_several_nodes_each_has_its_own(shard_at):
    shard = shard_at("shard-0", memory_address())
    placement = placed({"shard-0": shard.address})
    shard.adopt(placement)
    plugs = [RemoteExperts(DispatchConfig(name, SECRET, 10.0)) for name in ("a", "b")]
    places = [begin_trace(), ""]
    calls = []
    for plug, place in zip(plugs, places, strict=True):
        plug.adopt(placement)
        plug.trace(place)
    shard.start()
    for plug in plugs:
        calls.append(plug.dispatch(1, *drawn_tokens(4)))
    for call in calls:
        call.combine()
    [dispatch] = plugs[0].spans.take()
    assert plugs[1].spans.take() == []
    [work] = taken([shard])
    assert work.parent_id == dispatch.span_id
    for plug in plugs:
        plug.close()


def test_one_that_is_given_up_leaves_no_span_of_an_answer():
    plug = RemoteExperts(DispatchConfig("node", SECRET, 0.05))
    plug.adopt(placed({"nobody": memory_address()}))
    plug.trace(begin_trace())
    with pytest.raises(ExpertsUnavailable):
        mixed(plug, 1)
    assert plug.spans.take() == []
    plug.close()


@pytest.mark.parametrize("traced", ["x", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", 7, None])
def test_no_place_from_outside_is_taken_on_trust(traced: object):
    body = DispatchHeader(1, 1, 1, 1, (3,), (1,)).body()
    assert DispatchHeader.from_body([*body[:4], list(body[4]), list(body[5]), ""]).traceparent == ""
    with pytest.raises(ValueError, match="malformed"):
        DispatchHeader.from_body([*body[:4], list(body[4]), list(body[5]), traced])
