"""What is read from members and Serve, and over which while."""

from dataclasses import replace

from cluster.distribution import Tally
from cluster.gateway_report import GatewayReport
from cluster.pool_readings import PoolReadings
from cluster.ray_dashboard import PoolTarget
from cluster.scaling import PoolReading
from cluster.view import DRAINING, STARTING, Member, View
from decode.messages import NodeReport
from experts.messages import ShardReport


def node(name: str, kind: str, pid: int = 0, **numbers: object) -> Member:
    about = {"pool": numbers.pop("pool", ""), "state": numbers.pop("state", "ready")}
    zeros = dict.fromkeys(list(NodeReport.__dataclass_fields__)[3:14], 0)
    return Member(
        name, kind, f"memory://{name}", pid=pid, report=NodeReport(name, kind, "", **zeros | numbers), **about
    )


def shard(name: str, busy_s: float) -> Member:
    zeros = dict.fromkeys(list(ShardReport.__dataclass_fields__)[2:8], 0)
    return Member(name, "experts", "", report=ShardReport(name, "", **zeros, load=b"", busy_s=busy_s))


def gateway(**numbers: object) -> Member:
    return Member("gateway-1", "gateway", "", report=GatewayReport(**numbers))


def targets(**counts: int) -> dict[str, PoolTarget]:
    return {kind: PoolTarget(count, 0, 0) for kind, count in counts.items()}


def look(
    readings: PoolReadings,
    members: list[Member],
    now_s: float,
    slowness: float | None = None,
    roles: dict[str, str] | None = None,
    **counts: int,
) -> dict[str, PoolReading]:
    view = View(tuple(members), roles=roles or {})
    return {one.kind: one for one in readings.read(view, targets(**counts), slowness, now_s)}


def test_sums_of_nodes_and_of_those_who_wait_at_gateways():
    a, b = (
        node(name, "decode", pid, pages_total_count=100, pages_leased_count=40, requests_running_count=3)
        for pid, name in enumerate("ab")
    )
    waiting = gateway(requests_waiting_count=2, pages_waiting_count=9)
    read = look(PoolReadings(16), [a, b, waiting], 1.0, decode=2)["decode"]
    assert (read.pages_total_count, read.pages_leased_count, read.pages_awaited_count) == (200, 80, 9)
    assert (read.requests_count, read.requests_max_count, read.ready_count) == (8, 32, 2)
    assert read.is_complete


def test_without_gateways_a_reading_is_not_complete():
    assert not look(PoolReadings(16), [node("a", "decode")], 1.0, decode=1)["decode"].is_complete


def test_prompts_that_wait_for_pages_of_decode_do_not_press_prefill():
    readings = PoolReadings(16)
    for free_count, tokens_count in ((5, 100), (10, 1100)):
        members = [
            node("p", "prefill", 1, tokens_waiting_count=100),
            node("d", "decode", 2, pages_free_count=free_count),
            gateway(prompt_tokens_waiting_count=1000, pages_waiting_count=10),
        ]
        read = look(readings, members, 1.0, prefill=1, decode=1)["prefill"]
        assert read.tokens_waiting_count == tokens_count
        assert not read.is_complete  # nobody knows yet how fast it computes


def test_speed_and_busy_share_are_of_late_and_speed_is_remembered():
    readings, busy_s, tokens_count = PoolReadings(16), 0.0, 0
    for now_s in range(30):
        if now_s < 20:
            busy_s, tokens_count = busy_s + 0.5, tokens_count + 1000
        one = node("p", "prefill", busy_s=busy_s, tokens_count=tokens_count)
        read = look(readings, [one, gateway()], float(now_s), prefill=1)["prefill"]
        if now_s == 15:
            assert (read.busy_share, read.tokens_per_s) == (0.5, 2000.0)
    assert (read.busy_share, read.tokens_per_s) == (0.0, 2000.0)


def test_the_busiest_shard_counts_and_slowness_only_after_a_minute():
    readings = PoolReadings(16)
    for now_s in range(80):
        members = [shard("a", 0.9 * now_s), shard("b", 0.1 * now_s), gateway()]
        read = look(readings, members, float(now_s), 1.6 if now_s != 70 else 1.4, experts=2)["experts"]
        if now_s in (0, 30):
            assert read.slowness is None
    assert round(read.busy_share, 3) == 0.9
    assert read.slowness == 1.4


def test_latencies_are_of_late_and_a_new_gateway_brings_no_past():
    readings, tally = PoolReadings(16), Tally()
    for _ in range(100):
        tally.observe(9.0)
    members = [node("p", "prefill"), gateway(time_to_first_token_s=tally.distribution())]
    assert look(readings, members, 0.0, prefill=1)["prefill"].time_to_first_token_s is None
    for _ in range(10):
        tally.observe(0.1)
    members[1] = gateway(time_to_first_token_s=tally.distribution())
    assert 0.05 < look(readings, members, 2.0, prefill=1)["prefill"].time_to_first_token_s <= 0.15
    assert look(readings, members, 30.0, prefill=1)["prefill"].time_to_first_token_s is None


def test_nodes_that_are_missing_start_or_drain_are_counted_so():
    members = [
        node("a", "decode", 1),
        node("b", "decode", 2, state=STARTING),
        node("c", "decode", 3, state=DRAINING),
        gateway(),
    ]
    read = look(PoolReadings(16), members, 1.0, decode=4)["decode"]
    assert (read.target_count, read.ready_count, read.starting_count, read.draining_count) == (4, 1, 3, 1)


def test_a_lent_node_counts_where_it_serves_from_when_it_is_asked():
    a, b, d = node("a", "prefill", 1), node("b", "prefill", 2), node("d", "decode", 3)
    readings = PoolReadings(16)
    asked = look(readings, [a, b, d, gateway()], 1.0, roles={"b": "decode"}, prefill=2, decode=1)
    assert (asked["prefill"].lent_count, asked["prefill"].ready_count) == (1, 1)
    assert (asked["prefill"].draining_count, asked["decode"].starting_count) == (1, 1)
    lent = node("x", "decode", 2, pool="prefill")
    there = look(readings, [a, lent, d, gateway()], 2.0, prefill=2, decode=1)
    assert (there["prefill"].lent_count, there["decode"].ready_count) == (1, 2)
    assert there["decode"].starting_count == there["prefill"].starting_count == 0
    home = look(readings, [a, lent, d, gateway()], 3.0, roles={"x": "prefill"}, prefill=2, decode=1)
    assert (home["prefill"].lent_count, home["prefill"].starting_count) == (0, 1)


def test_a_process_that_serves_as_both_kinds_is_not_lent():
    both = [node("d", "decode", 7), replace(node("p", "prefill", 7), pool="decode"), gateway()]
    read = look(PoolReadings(16), both, 1.0, decode=1)["decode"]
    assert (read.lent_count, read.ready_count, read.starting_count) == (0, 1, 0)


def test_pages_that_wait_for_prefill_press_on_prefill_alone():
    waiting = gateway(prompt_tokens_waiting_count=900, pages_waiting_count=30)
    for arriving_count, held_count, awaited_count, tokens_count in ((80, 20, 0, 900), (20, 80, 30, 0)):
        pages = {"pages_total_count": 100, "pages_leased_count": 100, "pages_arriving_count": arriving_count}
        members = [node("p", "prefill", 1), node("d", "decode", 2, **pages), waiting]
        read = look(PoolReadings(16), members, 1.0, prefill=1, decode=1)
        assert read["decode"].pages_leased_count == held_count
        assert read["decode"].pages_awaited_count == awaited_count
        assert read["prefill"].tokens_waiting_count == tokens_count


def test_first_tokens_that_were_late_for_want_of_pages_do_not_press_prefill():
    readings, tally = PoolReadings(16), Tally()
    full = node("d", "decode", 2, pages_total_count=9, pages_leased_count=9)
    free = node("d", "decode", 2, pages_total_count=9, pages_free_count=9)
    for now_s, decode in ((0.0, full), (2.0, free), (20.0, free)):
        for _ in range(20):
            tally.observe(9.0)
        late = gateway(time_to_first_token_s=tally.distribution(), pages_waiting_count=3)
        read = look(readings, [node("p", "prefill", 1), decode, late], now_s, prefill=1, decode=1)
        assert (read["prefill"].time_to_first_token_s is not None) == (now_s == 20.0)
