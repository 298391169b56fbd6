"""What each metric is worth, out of reports: pure, and without a word of how metrics are published."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from cluster import metric_names as names
from cluster.distribution import Distribution
from cluster.gateway_report import OTHER, REASONS_MAX, GatewayReport
from cluster.metric_name import MetricName
from cluster.scaling import KINDS, PoolsReport, PoolState
from cluster.view import DRAINING, READY, STARTING, Member, View
from decode.messages import NodeReport
from experts.messages import DISPATCH_BOUNDS_S, DispatchReport, ShardReport
from experts.report import ExpertsReport
from kernels.model.pages import PAGE_TOKENS

Value = float | Distribution
Values = Iterator[tuple[str, tuple[str, ...], Value]]
"""(name, values of its labels in their order, value)"""

STATES = (STARTING, READY, DRAINING)
LABEL_CHARACTERS_MAX = 64


def of_view(view: View, silences_s: Mapping[str, float], lost_counts: Mapping[str, int]) -> Values:
    """All that members tell, how long each has been silent, and how many were lost by kind."""
    yield "trivium_ready", (), view.is_ready
    yield "trivium_experts_epoch", (), view.placement_in_force.epoch if view.placement_in_force else 0
    yield "trivium_experts_wanted_epoch", (), view.placement.epoch if view.placement else 0
    counts = Counter((member.kind, member.state) for member in view.members)
    for kind in KINDS:
        yield "trivium_actors_lost_total", (kind,), lost_counts.get(kind, 0)
        for state in STATES:
            yield "trivium_actors", (kind, state), counts[kind, state]
    for member in view.members:
        yield "trivium_actor_loaded_ratio", (member.kind, member.name), member.loaded_share
        if member.name in silences_s:
            yield "trivium_heartbeat_age_seconds", (member.kind, member.name), silences_s[member.name]
        yield from of_member(member)


def of_member(member: Member) -> Values:
    """What one member tells of itself."""
    match member.report:
        case GatewayReport() as report:
            yield from _fields(names.GATEWAY, report, (member.name,))
        case NodeReport() as report:
            yield from _of_node(report, (member.kind, member.name))
        case ShardReport() as report:
            yield from _fields(names.SHARDS, report, (member.name,))


def of_experts(report: ExpertsReport) -> Values:
    """How evenly the experts are loaded, and how they move."""
    yield from _fields(names.EXPERTS, report, ())
    yield "trivium_experts_balancedness_ratio", ("mean",), report.balance.mean_over_max
    yield "trivium_experts_balancedness_ratio", ("worst",), worst_layer(report.shard_loads)
    yield "trivium_experts_slowness_ratio", (), report.balance.slowness
    yield "trivium_experts_unplaceable", (), bool(report.problem)


def of_pools(report: PoolsReport) -> Values:
    """How many actors there are and should be, and what asks for others."""
    yield "trivium_autoscaler_enabled", (), report.is_enabled
    for pool in report.pools:
        yield from _of_pool(pool)


def aliases(report: GatewayReport, view: View) -> Values:
    """What endpoint pickers ask of a model server, which a gateway is to them."""
    yield from _fields(names.ALIASES, report, ())
    total_count, leased_count = decode_pages(view)
    yield "vllm:kv_cache_usage_perc", (), leased_count / total_count if total_count else 0.0
    yield "vllm:cache_config_info", (str(PAGE_TOKENS), str(total_count)), 1


def decode_pages(view: View) -> tuple[int, int]:
    """Pages of all decode nodes, and how many are leased."""
    reports = [member.report for member in view.of_kind("decode") if isinstance(member.report, NodeReport)]
    return sum(one.pages_total_count for one in reports), sum(one.pages_leased_count for one in reports)


def worst_layer(shard_loads: tuple[tuple[float, ...], ...]) -> float:
    """Mean over fullest shard of the layer in which that is least; 1 without load."""
    loads = np.asarray(shard_loads, dtype=float)
    busy = loads[loads.sum(axis=1) > 0] if loads.ndim == 2 else loads
    return float((busy.mean(axis=1) / busy.max(axis=1)).min()) if len(busy) else 1.0


def dispatches(report: DispatchReport) -> Distribution:
    """How long a node's dispatches took."""
    return Distribution(DISPATCH_BOUNDS_S, report.counts, report.took_s)


def _of_node(report: NodeReport, labels: tuple[str, str]) -> Values:
    yield from _fields(names.NODES, report, labels)
    yield from _fields(names.DISPATCH, report.dispatch, labels)
    yield "trivium_dispatch_seconds", labels, dispatches(report.dispatch)
    yield "trivium_node_pages", (*labels, "free"), report.pages_free_count
    yield "trivium_node_pages", (*labels, "cached"), report.pages_cached_count
    yield "trivium_node_pages", (*labels, "leased"), report.pages_leased_count


def _of_pool(pool: PoolState) -> Values:
    fields = [metric for metric in names.POOLS if metric.labels == ("pool",)]
    yield from _fields(fields, pool, (pool.kind,))
    yield "trivium_pool_held", (pool.kind,), pool.hold is not None
    for pressure in pool.pressures:
        yield "trivium_pool_pressure_ratio", (pool.kind, pressure.cause), pressure.level


def _fields(
    metrics: tuple[MetricName, ...] | list[MetricName], report: object, labels: tuple[str, ...]
) -> Values:
    """Metrics that are a field of a report each; a field with counts by reason is one value for each."""
    for metric in metrics:
        if not metric.field:
            continue
        value = getattr(report, metric.field)
        if isinstance(value, dict):
            for reason, count in bounded(value).items():
                yield metric.name, (*labels, reason), count
        else:
            yield metric.name, labels, value


def bounded(counts: Mapping[str, int]) -> Counter[str]:
    """Counts by reason, of as many and as long reasons as a label bears; the others together."""
    bounded_counts: Counter[str] = Counter()
    for reason, count in counts.items():
        is_short = len(reason) <= LABEL_CHARACTERS_MAX
        is_known = reason in bounded_counts or len(bounded_counts) < REASONS_MAX
        bounded_counts[reason if is_short and is_known else OTHER] += count
    return bounded_counts
