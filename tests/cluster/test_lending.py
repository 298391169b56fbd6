"""Which node is asked to serve as the other kind, and for how long that stands in every view."""

from dataclasses import replace

import pytest

from cluster.pool_readings import lent_of
from cluster.view import DRAINING, STARTING, Member
from tests.cluster.test_membership import Town, node, shard


def busy(member: Member, requests_count: int) -> Member:
    """A node with so many requests."""
    report = replace(member.report, requests_running_count=requests_count)
    return replace(member, report=report)


@pytest.fixture
def town() -> Town:
    """Two prefill nodes, the first the busier one, a decode node and two shards; each its own process."""
    town = Town()
    members = (
        shard("a"),
        shard("b"),
        node("d", "decode"),
        busy(node("p", "prefill"), 2),
        node("q", "prefill"),
    )
    town.add(*(replace(member, pid=pid) for pid, member in enumerate(members)))
    town.turn(3)
    return town


def test_the_idlest_is_asked_and_everybody_sees_it(town):
    assert town.turn().roles == {}
    assert town.membership.lend("prefill", "decode") == "q"
    assert town.turn().roles == {"q": "decode"}
    told = town.membership.heartbeat(town.members["q"], town.now_s)
    assert told.roles == {"q": "decode"}, "by its own heartbeat it hears of it"
    assert lent_of("prefill", town.turn()) == 1


def test_nobody_is_asked_twice(town):
    assert [town.membership.lend("prefill", "decode") for _ in range(3)] == ["q", "p", None]
    assert town.turn().roles == {"p": "decode", "q": "decode"}


def test_one_that_is_lent_goes_home_first_however_busy(town):
    town.add(busy(replace(node("l", "decode"), pid=9, pool="prefill"), 50))
    town.turn()
    assert town.membership.lend("decode", "prefill") == "l"


@pytest.mark.parametrize("state", [STARTING, DRAINING])
def test_who_is_not_ready_is_not_asked(town, state: str):
    town.members = {
        name: replace(member, state=state) if member.kind == "prefill" else member
        for name, member in town.members.items()
    }
    town.turn()
    assert town.membership.lend("prefill", "decode") is None


def test_shards_and_strangers_are_not_asked(town):
    assert town.membership.lend("experts", "decode") is None
    assert town.membership.lend("nowhere", "decode") is None


def test_a_process_that_serves_as_both_kinds_has_nothing_to_lend(town):
    del town.members["p"], town.members["q"], town.members["d"]
    for name in "pqd":
        town.membership.leave(name)
    both = [replace(node(name, name, address=f"unix:///{name}2"), pid=7) for name in ("prefill", "decode")]
    town.add(*(replace(member, pool="decode") for member in both))
    town.turn()
    assert town.membership.lend("prefill", "decode") is None
    assert town.membership.lend("decode", "prefill") is None
    assert town.turn().roles == {}


def test_what_was_asked_ends_with_the_member(town):
    town.membership.lend("prefill", "decode")
    town.membership.leave("q")
    del town.members["q"]
    assert town.turn().roles == {}
    town.membership.lend("prefill", "decode")
    del town.members["p"]
    assert town.turn(8).roles == {}, "one that fell silent too"


def test_a_view_keeps_its_own_roles(town):
    before = town.turn()
    town.membership.lend("prefill", "decode")
    assert before.roles == {}


def test_a_coordinator_that_begins_anew_asks_nobody(town):
    town.membership.lend("prefill", "decode")
    town.membership = town.coordinator()
    assert town.turn().roles == {}
