"""What monitors see of a cluster under load: endpoints, Ray's exporter, panels, alerts, traces."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_classic

from cluster import pools
from cluster.metric_names import ALIASES, EVERY
from cluster.validation import RequestedGeneration, RequestedSampling
from tests.cluster.promql import matchers, metric_names
from tests.cluster.test_dashboards import RULES, expressions
from tests.end_to_end.collector import Collector, collecting
from tests.end_to_end.stage import GREEDY_64, all_tokens, events_of, wait_until

SMALL = Path("examples/trivium-small")
REQUESTS_COUNT, TOKENS_COUNT = 12, 24
TROUBLES = {  # by reason or by who is lost: there are none while all is well
    "trivium_requests_failed_total",
    "trivium_node_failures_total",
    "trivium_actors_lost_total",
}
SERVICES = {"trivium-gateway", "trivium-prefill", "trivium-decode", "trivium-experts"}
SPANS = {"generate", "prefill queue", "prefill", "transfer", "latents", "decode", "dispatch", "experts"}
SCRAPE_S = 1.0
THRESHOLD = r"\s(<|>|==)\s[\d.]+$"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def scrape(url: str, accept: str = "") -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


@dataclass(frozen=True)
class Watched:
    """A cluster that shows all that it can."""

    address: str
    metrics_port: int
    collector: Collector


@pytest.fixture(scope="module")
def watched(stage) -> Iterator[Watched]:
    metrics_port = free_port()
    with collecting() as (collector, endpoint):
        sections = {
            "gateway": {"port": 0, "metrics_port": metrics_port},
            "operations": {"traces_endpoint": endpoint},
        }
        yield Watched(stage.cluster(SMALL, **sections), metrics_port, collector)
        stage.clear()


@pytest.fixture(scope="module")
def loaded(watched) -> tuple[str, str]:
    """Metrics addresses of the cluster's coordinator and gateway, when requests have gone through it."""
    sampling = RequestedSampling(temperature=0.0, tokens_max=TOKENS_COUNT, ignore_eos=True)
    prompts = [tuple(range(5 + number, 105 + number)) for number in range(REQUESTS_COUNT // 2)]
    for _ in range(2):  # the second time from the cache
        all_tokens(
            watched.address, [RequestedGeneration(token_ids=prompt, sampling=sampling) for prompt in prompts]
        )
    time.sleep(1.5)  # heartbeats tell it
    return pools.pools_page().split("/#")[0] + "/metrics", f"http://127.0.0.1:{watched.metrics_port}/metrics"


def samples(text: str, read=read_classic) -> Iterator:
    return (sample for family in read(text) for sample in family.samples)


def total(text: str, name: str) -> float:
    return sum(sample.value for sample in samples(text) if sample.name == name)


def test_every_metric_is_there_and_counts_what_was_done(loaded):
    text = scrape(loaded[0])
    names = {sample.name for sample in samples(text)}
    whole = names | {name.removesuffix("_bucket") for name in names}
    aliases = {metric.name for metric in ALIASES}
    assert {metric.name for metric in EVERY} - whole - aliases <= TROUBLES
    done = {
        "trivium_requests_finished_total": REQUESTS_COUNT,
        "trivium_output_tokens_total": REQUESTS_COUNT * TOKENS_COUNT,
        "trivium_prompt_tokens_total": REQUESTS_COUNT * 100,
        "trivium_time_to_first_token_seconds_count": REQUESTS_COUNT,
        "trivium_end_to_end_seconds_count": REQUESTS_COUNT,
        "trivium_inter_token_seconds_count": REQUESTS_COUNT * (TOKENS_COUNT - 1),
        "trivium_cached_tokens_total": REQUESTS_COUNT // 2 * 64,
        "trivium_ready": 1,
    }
    assert {name: total(text, name) for name in done} == done
    for name in ("trivium_node_busy_seconds_total", "trivium_node_latents_bytes_total"):
        assert total(text, name) > 0
    for name in (
        "trivium_dispatch_seconds_count",
        "trivium_shard_busy_seconds_total",
        "trivium_shard_slots_total",
    ):
        assert total(text, name) > 0


def test_both_formats_and_both_endpoints_say_the_same(loaded):
    of_cluster, of_gateway = loaded
    name = "trivium_requests_finished_total"
    openmetrics = scrape(of_cluster, "application/openmetrics-text; version=1.0.0")
    assert (
        sum(one.value for one in samples(openmetrics, read_openmetrics) if one.name == name) == REQUESTS_COUNT
    )
    text = scrape(of_gateway)
    assert total(text, name) == REQUESTS_COUNT
    assert {metric.name for metric in ALIASES} <= {sample.name for sample in samples(text)}
    assert total(text, "vllm:num_requests_running") == 0


def test_rays_exporter_carries_them_too(loaded):
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def carried() -> dict[str, float]:
        names = ("trivium_requests_finished_total", "trivium_output_tokens_total")
        text = scrape(url)
        return {name: total(text, f"ray_{name}") for name in names}

    wanted = {
        "trivium_requests_finished_total": REQUESTS_COUNT,
        "trivium_output_tokens_total": REQUESTS_COUNT * TOKENS_COUNT,
    }
    assert wait_until(lambda: carried() == wanted, 30), carried()


def test_every_panel_and_alert_reads_series_that_are_there(loaded):
    there = list(samples(scrape(loaded[0])))
    for place, expression in expressions().items():
        wanted = [
            (label, operator, value)
            for label, operator, value in matchers(expression)
            if label in ("pool", "state", "layers") and operator == "="
        ]
        for name in metric_names(expression) - TROUBLES:
            found = [sample for sample in there if sample.name == name]
            assert found, f"{place}: nothing is called {name}"
            for label, _, value in wanted:
                values = {sample.labels[label] for sample in found if label in sample.labels}
                assert not values or value in values or label == "state", f"{place}: no {label} {value}"


@pytest.fixture
def prometheus(loaded, tmp_path) -> Iterator[str]:
    """A Prometheus that scrapes the cluster and knows our rules."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("there is no prometheus on this machine")
    jobs = [
        {"job_name": "trivium", "static_configs": [{"targets": [urllib.parse.urlsplit(url).netloc]}]}
        for url in loaded[:1]
    ]
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S:.0f}s", "evaluation_interval": "1s"},
        "scrape_configs": jobs,
        "rule_files": [str(path.resolve()) for path in RULES],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def asked(prometheus: str, path: str, **parameters: str) -> dict:
    url = f"{prometheus}{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)["data"]


def test_a_real_prometheus_understands_every_panel_and_alert(prometheus):
    def is_scraped() -> bool:
        try:
            return bool(
                asked(prometheus, "/api/v1/query", query="count_over_time(trivium_ready[20s]) > 5")["result"]
            )
        except OSError:
            return False

    assert wait_until(is_scraped, 40)
    for place, expression in expressions().items():
        concrete = re.sub(r"\$(job|namespace)", ".*", expression.replace("$__rate_interval", "10s"))
        result = asked(prometheus, "/api/v1/query", query=concrete)["result"]
        if re.search(THRESHOLD, concrete):  # that nobody is beyond is well
            result = asked(prometheus, "/api/v1/query", query=re.sub(THRESHOLD, "", concrete))["result"]
        is_alert = place.split(":")[0].endswith(".yaml")
        silent = metric_names(expression) & TROUBLES
        assert result or is_alert or silent, f"{place} shows nothing: {concrete}"
    groups = asked(prometheus, "/api/v1/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules and all(rule["health"] == "ok" for rule in rules), [
        rule["lastError"] for rule in rules if "lastError" in rule
    ]
    firing = [
        rule["name"] for rule in rules if rule["state"] == "firing" and rule["labels"]["severity"] != "info"
    ]
    assert not firing, "nothing is wrong with this cluster"


def test_one_trace_joins_all_processes(watched, loaded):
    collector = watched.collector
    wait_until(lambda: len(collector.of_name("generate")) == REQUESTS_COUNT, 20)
    collector.spans.clear()
    events_of(watched.address, RequestedGeneration(token_ids=(5, 6, 7), sampling=GREEDY_64))
    assert wait_until(lambda: len(collector.of_name("generate")) == 1, 20)
    [root] = collector.of_name("generate")

    def names() -> set[str]:
        return {span["name"] for _, span in collector.of_trace(root["traceId"])}

    assert wait_until(lambda: names() == SPANS, 20), names()
    time.sleep(1.5)  # what is left is on its way
    spans = collector.of_trace(root["traceId"])
    assert {service for service, _ in spans} == SERVICES
    ids = {span["spanId"] for _, span in spans}
    orphans = [span["name"] for _, span in spans if span is not root and span.get("parentSpanId") not in ids]
    assert not orphans and "parentSpanId" not in root
    begin, end = int(root["startTimeUnixNano"]), int(root["endTimeUnixNano"])
    slack = 50_000_000  # clocks of processes are read apart
    for _, span in spans:
        assert begin - slack <= int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"]) <= end + slack
    services_under = {span["spanId"]: service for service, span in spans}
    parents = {
        services_under[span["parentSpanId"]] for service, span in spans if service == "trivium-experts"
    }
    assert parents == {"trivium-prefill", "trivium-decode"}, "shards work under the dispatch of a node"
