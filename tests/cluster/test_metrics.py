"""Metrics: every one has a value when a cluster has seen everything, and both text forms can be parsed."""

import asyncio
from collections import defaultdict
from dataclasses import fields, replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from cluster.client import Client, Finished
from cluster.gateway_report import REASONS_MAX, GatewayReport
from cluster.metric_name import COUNTER, HISTOGRAM
from cluster.metric_names import ALIASES, EVERY
from cluster.metric_values import worst_layer
from cluster.metrics import exposition, families, gateway_families, mirrored
from cluster.stats_line import stats_line
from cluster.validation import RequestedGeneration, RequestedSampling
from cluster.view import Member, View
from decode.messages import UP, NodeReport
from experts.client import RemoteExperts
from experts.config import DispatchConfig
from experts.messages import ShardReport
from tests.cluster import told
from tests.cluster.metrics_page import PAGE, page
from tests.cluster.served import load_transformer, running_nodes, served, view_of

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
CLASSIC = "text/plain;version=0.0.4"


def full(scale: int = 1) -> list:
    """All families of a cluster that has seen everything."""
    arguments = (told.experts_report(), told.pools_report(), told.SILENCES_S, told.LOST_COUNTS)
    return families(told.view(scale), *arguments)


def of_gateway() -> list:
    """All families of its gateway."""
    view = told.view()
    return gateway_families(view.of_kind("gateway")[0], view)


def samples(metrics: list) -> dict[tuple, float]:
    """Values by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in metrics
        for sample in metric.samples
    }


def value(metrics: list, name: str, **labels: str) -> float:
    """One sample."""
    return samples(metrics)[(name, *sorted(labels.items()))]


def test_every_metric_of_the_table_has_a_value():
    published = {sample.name for metric in full() + of_gateway() for sample in metric.samples}
    for metric in EVERY:
        assert (f"{metric.name}_bucket" if metric.kind == HISTOGRAM else metric.name) in published


def test_every_name_says_its_kind_and_none_stands_twice():
    assert len({metric.name for metric in EVERY}) == len(EVERY)
    for metric in EVERY:
        assert metric.name.startswith("vllm:" if metric in ALIASES else "trivium_")
        assert (metric.kind == COUNTER) == metric.name.endswith("_total")
        assert not metric.name.endswith(("_count", "_sum", "_bucket", "_created"))
        if metric.unit in ("seconds", "bytes"):
            assert f"_{metric.unit}" in metric.name
        assert metric.meaning[0].isupper() and metric.meaning.endswith(".")


def test_values_are_those_of_the_reports():
    metrics = full()
    assert value(metrics, "trivium_requests_finished_total", node="gateway-1", reason="stop") == 30
    assert value(metrics, "trivium_node_pages", pool="prefill", node="prefill-1", state="cached") == 30
    assert value(metrics, "trivium_actors", pool="decode", state="draining") == 1
    assert value(metrics, "trivium_actors_lost_total", pool="decode") == 2
    assert value(metrics, "trivium_shard_busy_seconds_total", node="shard-1") == 1.25
    assert value(metrics, "trivium_experts_balancedness_ratio", layers="worst") == pytest.approx(2 / 3)
    assert value(metrics, "trivium_pool_held", pool="prefill") == 1
    assert value(metrics, "trivium_pool_pressure_ratio", pool="decode", cause="pages") == pytest.approx(1.125)
    assert value(metrics, "trivium_ready") == 1


def test_histograms_rise_to_their_count():
    for name, labels in (
        ("trivium_inter_token_seconds", {"node": "gateway-1"}),
        ("trivium_dispatch_seconds", {"node": "decode-1", "pool": "decode"}),
    ):
        family = next(metric for metric in full(7) if metric.name == name)
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in family.samples
            if sample.name.endswith("_bucket") and labels.items() <= sample.labels.items()
        ]
        assert buckets == sorted(buckets) and [count for _, count in buckets] == sorted(
            count for _, count in buckets
        )
        assert buckets[-1] == (float("inf"), value(full(7), f"{name}_count", **labels))


@pytest.mark.parametrize("accept, parse", [(OPENMETRICS, parse_openmetrics), (CLASSIC, parse_classic)])
@pytest.mark.parametrize("make", [full, of_gateway])
def test_what_is_published_can_be_parsed(accept, parse, make):
    text, content_type = exposition(make(), accept)
    assert content_type.startswith(accept.split(";")[0])
    assert samples(list(parse(text.decode()))) == samples(make())


@pytest.mark.parametrize(
    "accept", ["", "*/*", "application/openmetrics", "text/plain;version=9.x", ";;," * 400]
)
def test_an_accept_header_that_names_nothing_known_gets_the_classic_text(accept):
    text, content_type = exposition(full(), accept)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert text.startswith(b"# HELP trivium_ready ")


def test_an_empty_cluster_is_published_too():
    metrics = families(View())
    assert value(metrics, "trivium_ready") == 0
    assert value(metrics, "trivium_actors", pool="decode", state="ready") == 0
    member = Member("gateway-1", "gateway", "", report=GatewayReport())
    assert value(gateway_families(member, View()), "vllm:kv_cache_usage_perc") == 0


def test_gateways_tell_what_endpoint_pickers_ask():
    metrics = of_gateway()
    assert value(metrics, "vllm:num_requests_waiting") == 3
    assert value(metrics, "vllm:num_requests_running") == 4
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.5
    assert value(metrics, "vllm:cache_config_info", block_size="64", num_gpu_blocks="200") == 1
    assert not [name for name, *_ in samples(full()) if name.startswith("vllm:")]


def test_the_mirror_carries_every_sample_but_aliases():
    carried = {(name, *sorted(labels.items())): value for name, labels, value in mirrored(full())}
    assert carried == samples(full())
    assert all(name.startswith("trivium_") for name, *_ in mirrored(of_gateway()))


def test_label_values_are_bounded():
    reasons = {f"reason_{number}": 1 for number in range(500)} | {"x" * 5000: 1}
    node = replace(told.node_report("d", "decode"), failures=reasons)
    members = tuple(Member(f"decode-{index}", "decode", "", report=node) for index in range(3))
    values = defaultdict(set)
    for name, labels, _ in mirrored(families(View(members))):
        for label in labels.items():
            values[name, label[0]].add(label[1])
    failures = values["trivium_node_failures_total", "reason"]
    assert len(failures) == REASONS_MAX + 1 and max(map(len, failures)) <= 64
    assert all(len(some) <= REASONS_MAX + 1 for (_, label), some in values.items() if label != "le")
    one = value(
        families(View(members)), "trivium_node_failures_total", pool="decode", node="decode-0", reason="other"
    )
    assert one == 501 - REASONS_MAX


def test_counters_of_those_who_stay_do_not_fall_when_one_leaves():
    before, after = told.view(1), told.view(2)
    after = replace(after, members=tuple(one for one in after.members if one.name != "decode-2"))
    then, now = samples(families(before)), samples(families(after))
    counters = {metric.name for metric in EVERY if metric.kind == COUNTER}
    fallen = [key for key in then.keys() & now.keys() if key[0] in counters and now[key] < then[key]]
    gone = then.keys() - now.keys()
    assert not fallen
    assert gone and all(("node", "decode-2") in key for key in gone)


def test_no_number_of_a_report_is_left_out():
    shown = {metric.field for metric in EVERY} | {
        "pages_free_count",
        "pages_cached_count",
        "pages_leased_count",
    }
    known = {"name", "kind", "address", "weights_address", "dispatch", "load", "pages_total_count"}
    for report in (GatewayReport, NodeReport, ShardReport):
        assert {field.name for field in fields(report)} - shown - known == set()


def test_the_page_on_metrics_is_true():
    assert PAGE.read_text() == page(), "run: python -m tests.cluster.metrics_page"


def test_worst_layer_passes_over_layers_without_load():
    assert worst_layer(((0.0, 0.0), (0.5, 0.5), (1.0, 0.0))) == 0.5
    assert worst_layer(()) == 1.0
    assert worst_layer(((0.0, 0.0),)) == 1.0


def test_the_stats_line_tells_what_has_happened_since():
    line = stats_line(told.view(1), told.view(3), 10.0)
    assert "1 gateway, 1 prefill, 2 decode, 1 experts" in line
    assert "4 running, 3 waiting" in line
    assert "16.0 finished/s, 2000 tokens/s in, 1000 out" in line
    assert "2 failed, 10 shed, 12 cancelled, 14 retried" in line
    assert "latents 200.0 MB/s" in line
    assert "prefill 80% busy, 50% of pages leased" in line
    assert "\n" not in line


def test_the_stats_line_of_a_cluster_that_rests_is_short():
    assert stats_line(told.view(), told.view(), 10.0).count(";") == 3
    assert stats_line(View(), told.view(), 10.0) == "1 gateway, 1 prefill, 2 decode, 1 experts"


def test_a_node_report_travels_whole_and_light():
    report = told.node_report("d", "decode")

    class Wire:
        """Keeps what is sent."""

        def send(self, kind: str, body: dict, parts: list) -> None:
            self.kind, self.body = kind, body

    wire = Wire()
    UP.send(wire, report)
    listed = wire.body | {"dispatch": wire.body["dispatch"] | {"counts": list(report.dispatch.counts)}}
    assert UP.read(wire.kind, listed) == report


def test_a_plug_without_dispatches_reports_nothing():
    report = RemoteExperts(DispatchConfig("node", "a secret", 1.0)).report()
    assert sum(report.counts) == 0 and report.took_s == report.waited_s == 0.0


def test_what_a_served_request_leaves_in_all_reports(tmp_path):
    sampling = RequestedSampling(temperature=0.0, tokens_max=8, ignore_eos=True)
    prompt = RequestedGeneration(token_ids=tuple(range(5, 135)), sampling=sampling)

    async def run(nodes: dict) -> View:
        async with served(view_of(nodes)) as gateway, Client(gateway.address) as client:
            for _ in range(2):
                events = [event async for event in client.generate(prompt)]
                assert isinstance(events[-1], Finished)
            await gateway.is_idle()
            member = Member("gateway", "gateway", "", report=gateway.desk.report())
            return View((*view_of(nodes).members, member))

    with running_nodes(load_transformer(), tmp_path) as nodes:
        metrics = families(asyncio.run(run(nodes)))
    of = {"node": "gateway"}
    assert value(metrics, "trivium_requests_finished_total", reason="length", **of) == 2
    assert value(metrics, "trivium_output_tokens_total", **of) == 16
    assert value(metrics, "trivium_prompt_tokens_total", **of) == 260
    assert value(metrics, "trivium_cached_tokens_total", **of) == 128
    assert value(metrics, "trivium_time_to_first_token_seconds_count", **of) == 2
    assert value(metrics, "trivium_inter_token_seconds_count", **of) == 14
    assert value(metrics, "trivium_node_cached_tokens_total", pool="prefill", node="p") == 128
    assert value(metrics, "trivium_node_tokens_total", pool="prefill", node="p") == 260 - 128
    sent = value(metrics, "trivium_node_latents_bytes_total", pool="prefill", node="p")
    assert sent == value(metrics, "trivium_node_latents_bytes_total", pool="decode", node="d") > 0
    assert value(metrics, "trivium_node_receiving_seconds_total", pool="decode", node="d") > 0
    first = value(metrics, "trivium_time_to_first_token_seconds_sum", **of)
    gaps = value(metrics, "trivium_inter_token_seconds_sum", **of)
    assert first + gaps == pytest.approx(value(metrics, "trivium_end_to_end_seconds_sum", **of), rel=0.05)
