"""Which node is chosen, and which is never."""

import pytest

from cluster.node_choice import NodeView, choose_awaited, choose_decode, choose_prefill, pages_largest_count
from decode.messages import NodeReport
from kernels.model.pages import PAGE_TOKENS, page_hashes


def report(
    name: str, kind: str, free: int = 10, cached: int = 0, total: int = 10, running: int = 0, tokens: int = 0
) -> NodeReport:
    leased = total - free - cached
    return NodeReport(name, kind, "", running, 0, tokens, total, free, cached, leased, 0, 0, 0, 0)


def node(name: str, kind: str = "decode", **numbers: int) -> NodeView:
    view = NodeView(name, kind, report=report(name, kind, **numbers))
    view.pages_available_count = view.report.pages_free_count + view.report.pages_cached_count
    return view


def unknown(kind: str) -> NodeView:
    return NodeView("unknown", kind)


def draining(view: NodeView) -> NodeView:
    view.is_draining = True
    return view


# decode


def test_cached_pages_are_room():
    assert choose_decode([node("a", free=1, cached=3)], 4).name == "a"


def test_a_node_without_all_the_pages_is_not_chosen():
    assert choose_decode([node("a", free=3)], 4) is None


def test_the_least_loaded_decode_node_is_chosen():
    busy, idle = node("a", running=3), node("b", running=2)
    assert choose_decode([busy, idle], 1) is idle


def test_load_is_ours_or_the_reported_one_whichever_is_more():
    ours, theirs = node("a"), node("b", running=2)
    ours.requests_count = 3
    assert choose_decode([ours, theirs], 1) is theirs


def test_of_equally_loaded_nodes_the_emptiest_and_then_the_first_by_name():
    full, empty, as_empty = node("a", free=5), node("c", free=8), node("b", free=8)
    assert choose_decode([full, empty, as_empty], 1) is as_empty


@pytest.mark.parametrize("other", [draining(node("a")), unknown("decode"), node("a", "prefill")])
def test_draining_unknown_and_prefill_nodes_do_not_decode(other: NodeView):
    assert choose_decode([other], 1) is None


def test_a_decode_node_to_avoid_is_better_than_none():
    failed, loaded = node("a"), node("b", running=9)
    assert choose_decode([failed, loaded], 1, avoids=("a",)) is loaded
    assert choose_decode([failed], 1, avoids=("a",)) is failed


# waiting for room


def test_one_waits_where_most_is_free():
    assert choose_awaited([node("a", free=2), node("b", free=3)], 5, "").name == "b"


def test_one_goes_on_waiting_where_it_did():
    assert choose_awaited([node("a", free=2), node("b", free=3)], 5, "a").name == "a"


def test_nobody_waits_for_a_node_that_is_too_small_or_draining():
    assert choose_awaited([node("a", total=4, free=4), draining(node("b", total=9))], 5, "b") is None


# prefill


def test_the_prefill_node_with_the_shortest_queue_is_chosen():
    long, short = node("a", "prefill", tokens=200), node("b", "prefill", tokens=100)
    assert choose_prefill([long, short], [], 10) is short


def test_what_was_sent_since_the_report_counts():
    sent, reported = node("a", "prefill", tokens=10), node("b", "prefill", tokens=100)
    sent.tokens_sent_count = 200
    assert choose_prefill([sent, reported], [], 10) is reported


def test_a_cached_prefix_is_worth_the_tokens_that_it_saves():
    hashes = page_hashes(range(4 * PAGE_TOKENS))
    cold, warm = node("a", "prefill"), node("b", "prefill", tokens=3 * PAGE_TOKENS)
    assert choose_prefill([cold, warm], hashes, 4 * PAGE_TOKENS) is cold
    warm.remember_prefix(hashes)
    assert choose_prefill([cold, warm], hashes, 4 * PAGE_TOKENS) is warm
    warm.tokens_sent_count = 5 * PAGE_TOKENS
    assert choose_prefill([cold, warm], hashes, 4 * PAGE_TOKENS) is cold


def test_only_the_beginning_of_a_prompt_can_be_cached():
    hashes = page_hashes(range(4 * PAGE_TOKENS))
    view = node("a", "prefill")
    view.remember_prefix(hashes[1:])
    assert view.cached_tokens_count(hashes) == 0
    view.remember_prefix(hashes[:1])
    assert view.cached_tokens_count(hashes) == 4 * PAGE_TOKENS


def test_no_more_prefixes_are_remembered_than_the_node_has_pages():
    view = node("a", "prefill", total=3, free=3)
    old, new = page_hashes(range(2 * PAGE_TOKENS)), page_hashes(range(1, 2 * PAGE_TOKENS + 1))
    view.remember_prefix(old)
    view.remember_prefix(new)
    assert len(view.prefixes) == 3
    assert view.cached_tokens_count(old) == 0
    assert view.cached_tokens_count(new) == 2 * PAGE_TOKENS


@pytest.mark.parametrize("other", [draining(node("a", "prefill")), unknown("prefill"), node("a")])
def test_draining_unknown_and_decode_nodes_do_not_prefill(other: NodeView):
    assert choose_prefill([other], [], 1) is None


def test_a_prompt_goes_to_a_prefill_node_that_can_hold_it():
    small, large = node("a", "prefill", total=1, free=1), node("b", "prefill", total=2, free=0, tokens=500)
    assert choose_prefill([small, large], [], PAGE_TOKENS + 1) is large
    assert choose_prefill([small], [], PAGE_TOKENS + 1) is None


def test_a_prefill_node_to_avoid_is_better_than_none():
    failed, loaded = node("a", "prefill"), node("b", "prefill", tokens=900)
    assert choose_prefill([failed, loaded], [], 10, avoids=("a",)) is loaded
    assert choose_prefill([failed], [], 10, avoids=("a",)) is failed


# sizes


def test_the_largest_node_counts_even_while_it_drains():
    nodes = [node("a", total=10), draining(node("b", total=20)), node("c", "prefill", total=30)]
    assert pages_largest_count(nodes, "decode") == 20


@pytest.mark.parametrize("nodes", [[], [node("a", "prefill")], [node("a"), unknown("decode")]])
def test_sizes_are_unknown_until_all_have_told_theirs(nodes: list[NodeView]):
    assert pages_largest_count(nodes, "decode") is None
