"""A cluster of which every report has something in every field: for whoever publishes what reports say."""

from cluster.distribution import Distribution, Tally
from cluster.gateway_report import GatewayReport
from cluster.scaling import Decision, Hold, PoolsReport, PoolState, Pressure
from cluster.view import DRAINING, READY, Member, View
from decode.messages import NodeReport
from experts.balance import Balance
from experts.messages import DISPATCH_BOUNDS_S, DispatchReport, Placement, ShardAddress, ShardReport
from experts.report import ExpertsReport

SILENCES_S = {"gateway-1": 0.1, "prefill-1": 0.2, "decode-1": 0.3, "shard-1": 0.4}
LOST_COUNTS = {"decode": 2}


def seen(*values: float) -> Distribution:
    """The distribution of some values."""
    tally = Tally()
    for value in values:
        tally.observe(value)
    return tally.distribution()


def gateway_report(scale: int = 1) -> GatewayReport:
    """A gateway that has seen all that can happen, `scale` times."""
    return GatewayReport(
        requests_running_count=4,
        requests_waiting_count=3,
        prompt_tokens_waiting_count=900,
        pages_waiting_count=20,
        admitted_count=100 * scale,
        shed_count=5 * scale,
        cancelled_count=6 * scale,
        retried_count=7 * scale,
        migrated_count=2 * scale,
        finished_counts={"length": 50 * scale, "stop": 30 * scale},
        failed_counts={"node_lost": 1 * scale},
        prompt_tokens_count=10_000 * scale,
        cached_tokens_count=4_000 * scale,
        output_tokens_count=5_000 * scale,
        time_to_first_token_s=seen(*[0.2, 0.25] * scale),
        inter_token_s=seen(*[0.02, 0.03] * scale),
        end_to_end_s=seen(*[2.0] * scale),
        queued_s=seen(*[0.05] * scale),
        prefill_s=seen(*[0.15] * scale),
        transfer_s=seen(*[0.001] * scale),
    )


def node_report(name: str, kind: str, scale: int = 1) -> NodeReport:
    """A node that has computed, found, sent, dispatched and failed."""
    counts = [0] * (len(DISPATCH_BOUNDS_S) + 1)
    counts[7] = 1000 * scale
    return NodeReport(
        name=name,
        kind=kind,
        address="tcp://10.0.0.1:7",
        requests_running_count=4,
        requests_waiting_count=2,
        tokens_waiting_count=700,
        pages_total_count=100,
        pages_free_count=20,
        pages_cached_count=30,
        pages_leased_count=50,
        tokens_count=6_000 * scale,
        steps_count=200 * scale,
        experts_epoch=3,
        refused_frames_count=1 * scale,
        failures={"decode_unreachable": 2 * scale},
        transfer_s=0.5 * scale,
        busy_s=4.0 * scale,
        cached_tokens_count=4_000 * scale,
        latents_bytes=500_000_000 * scale,
        receiving_s=0.25 * scale,
        dispatch=DispatchReport(tuple(counts), 1.5 * scale, 0.5 * scale, 3 * scale, 1 * scale),
    )


def view(scale: int = 1) -> View:
    """One of each kind, and a decode node that drains; `scale` times as much has happened."""
    placement = Placement(3, 1, (ShardAddress("shard-1", "tcp://10.0.0.1:9"),), (((0,),),))
    shard = ShardReport("shard-1", "tcp://10.0.0.1:9", 3, 16, 900 * scale, 9_000 * scale, 4, 5, (), 1.25)
    members = (
        Member(
            "decode-1",
            "decode",
            "tcp://10.0.0.1:7",
            state=READY,
            report=node_report("decode-1", "decode", scale),
        ),
        Member(
            "decode-2",
            "decode",
            "tcp://10.0.0.1:7",
            state=DRAINING,
            report=node_report("decode-2", "decode", scale),
        ),
        Member("gateway-1", "gateway", "tcp://10.0.0.1:7", report=gateway_report(scale)),
        Member("prefill-1", "prefill", "tcp://10.0.0.1:7", report=node_report("prefill-1", "prefill", scale)),
        Member("shard-1", "experts", "tcp://10.0.0.1:7", report=shard),
    )
    return View(members, placement, placement, 3)


def experts_report() -> ExpertsReport:
    """Two layers, one of them uneven; something of all has happened."""
    loads = ((0.5, 0.5), (0.75, 0.25))
    return ExpertsReport(None, loads, (), Balance(5 / 6, 0.8, 0.25), True, False, 4, 1, 2, "")


def pools_report() -> PoolsReport:
    """Two pools, of which a person holds one."""
    pressure = Pressure("pages", 0.9, 0.8, "90% of pages", "80%")
    states = (
        PoolState("decode", 2, 1, 0, 1, 0, 0, 1, 8, None, (pressure,), "why", "what", 3, 1),
        PoolState("prefill", 1, 1, 0, 0, 0, 0, 1, 8, Hold("prefill", 1, "a person", 5.0), (), "", ""),
    )
    return PoolsReport(100.0, True, states, (Decision(90.0, "decode", 1, 2, "pages"),))
