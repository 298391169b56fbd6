"""One request, one trace, through every process that had a part in it."""

from pathlib import Path

from cluster.validation import RequestedGeneration
from tests.end_to_end.collector import collecting
from tests.end_to_end.stage import GREEDY_64, events_of, wait_until

SMALL = Path("examples/trivium-small")
SERVICES = {"trivium-gateway", "trivium-prefill", "trivium-decode", "trivium-experts"}
NAMES = {"generate", "prefill queue", "prefill", "transfer", "latents", "decode", "dispatch", "experts"}


def test_one_trace_joins_all_processes(stage):
    with collecting() as (collector, endpoint):
        address = stage.cluster(SMALL, operations={"traces_endpoint": endpoint})
        events_of(address, RequestedGeneration(token_ids=(5, 6, 7), sampling=GREEDY_64))

        def roots() -> list[dict]:
            return [span for _, span in collector.spans if span["name"] == "generate"]

        assert wait_until(lambda: len(roots()) == 1, 20)
        [root] = roots()
        whole = lambda: {span["name"] for _, span in collector.of_trace(root["traceId"])}  # noqa: E731
        assert wait_until(lambda: whole() == NAMES, 20), whole()
        stage.clear()  # what is left is sent at the end
    spans = collector.of_trace(root["traceId"])
    assert len(spans) == len(collector.spans), "every span is of the one request"
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
