"""Metrics as Prometheus reads them: the one file that knows its client library."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from cluster.distribution import Distribution
from cluster.gateway_report import GatewayReport
from cluster.metric_name import COUNTER, INFO, MetricName
from cluster.metric_names import EVERY
from cluster.metric_values import Value, aliases, of_experts, of_member, of_pools, of_view
from cluster.scaling import PoolsReport
from cluster.view import Member, View
from experts.report import ExpertsReport

INFINITY = "+Inf"
OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_1 = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"


def families(
    view: View,
    experts: ExpertsReport | None = None,
    pools: PoolsReport | None = None,
    silences_s: Mapping[str, float] | None = None,
    lost_counts: Mapping[str, int] | None = None,
) -> list[Metric]:
    """Metrics of the whole cluster; seconds of silence go by member, counts of lost members by kind."""
    values = list(of_view(view, silences_s or {}, lost_counts or {}))
    if experts is not None:
        values.extend(of_experts(experts))
    if pools is not None:
        values.extend(of_pools(pools))
    return _families(values)


def gateway_families(member: Member, view: View) -> list[Metric]:
    """Metrics of one gateway, and under others' names what their gateways ask of a model server."""
    values = list(of_member(member))
    if isinstance(member.report, GatewayReport):
        values.extend(aliases(member.report, view))
    return _families(values)


def exposition(metrics: Iterable[Metric], accept: str) -> tuple[bytes, str]:
    """Metrics as text, and its content type: OpenMetrics for an Accept header that names it, else classic."""
    collected = _Collected(metrics)
    if OPENMETRICS in accept:
        # no name of ours needs escaping, and what escapes would take the colons out of aliases
        return openmetrics.generate_latest(collected, escaping=openmetrics.ALLOWUTF8), OPENMETRICS_1
    return generate_latest(collected), CONTENT_TYPE_PLAIN_0_0_4


def mirrored(metrics: Iterable[Metric]) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of every sample but aliases, for an exporter of gauges alone."""
    for metric in metrics:
        for sample in metric.samples:
            if ":" not in sample.name:
                yield sample.name, sample.labels, sample.value


class _Collected:
    """What the library takes for a registry."""

    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = list(metrics)

    def collect(self) -> list[Metric]:
        return self._metrics


def _families(values: Iterable[tuple[str, tuple[str, ...], Value]]) -> list[Metric]:
    """Values by metric, in the order of the table; a metric without a value is left out."""
    by_name: dict[str, list[tuple[tuple[str, ...], Value]]] = {}
    for name, labels, value in values:
        by_name.setdefault(name, []).append((labels, value))
    return [_family(metric, by_name[metric.name]) for metric in EVERY if metric.name in by_name]


def _family(metric: MetricName, values: list[tuple[tuple[str, ...], Value]]) -> Metric:
    suffix = {COUNTER: "_total", INFO: "_info"}.get(metric.kind, "")
    family = Metric(metric.name.removesuffix(suffix), metric.meaning, metric.kind)
    for label_values, value in values:
        labels = dict(zip(metric.labels, label_values, strict=True))
        if isinstance(value, Distribution):
            family.samples.extend(_buckets(metric.name, labels, value))
        else:
            family.samples.append(Sample(metric.name, labels, float(value)))
    return family


def _buckets(name: str, labels: dict[str, str], distribution: Distribution) -> Iterator[Sample]:
    bounds = (*map(floatToGoString, distribution.bounds), INFINITY)
    for bound, count in zip(bounds, distribution.counts_up_to, strict=True):
        yield Sample(f"{name}_bucket", {**labels, "le": bound}, count)
    yield Sample(f"{name}_count", labels, distribution.count)
    yield Sample(f"{name}_sum", labels, distribution.total)
