"""Dashboards and alerts speak only of metrics that exist, and every metric is on one of them."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from cluster.metric_names import ALIASES, EVERY
from cluster.metrics import families
from cluster.scaling import KINDS
from tests.cluster import told
from tests.cluster.promql import label_names, matchers, metric_names

DASHBOARDS = sorted(Path("helm/dashboards").glob("*.json"))
RULES = sorted(Path("helm/rules").glob("*.yaml"))
UNSHOWN = {metric.name for metric in ALIASES}  # the same numbers as ours, for endpoint pickers
SCRAPED = {"job", "namespace", "instance", "le"}  # labels that Prometheus adds
KNOWN_VALUES = {
    "pool": set(KINDS),
    "state": {"starting", "ready", "draining", "free", "cached", "leased"},
    "layers": {"mean", "worst"},
}
SEVERITIES = {"critical", "warning", "info"}
RUNBOOK_CHARACTERS_MIN = 40


def panels(path: Path) -> list[dict]:
    """Panels that show something."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def alerts(path: Path) -> list[dict]:
    """Alerts of all groups."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Every expression of every panel and alert, by where it stands."""
    shown = {
        f"{path.name}: {panel['title']} {target['refId']}": target["expr"]
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    }
    return shown | {
        f"{path.name}: {alert['alert']}": alert["expr"] for path in RULES for alert in alerts(path)
    }


def series() -> dict[str, set[str]]:
    """Labels of every sample that a cluster publishes which has seen everything."""
    arguments = (told.experts_report(), told.pools_report(), told.SILENCES_S, told.LOST_COUNTS)
    labels: dict[str, set[str]] = {}
    for metric in families(told.view(), *arguments):
        for sample in metric.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def wrong_in(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What an expression says that is not so."""
    names = metric_names(expression)
    wrong = [f"no metric {name}" for name in sorted(names - known.keys())]
    labels = SCRAPED.union(*(known.get(name, set()) for name in names))
    wrong += [f"no label {label}" for label in sorted(label_names(expression) - labels)]
    for label, operator, value in matchers(expression):
        if label in KNOWN_VALUES and operator in ("=", "=~"):
            wrong += [f"no {label} {one}" for one in value.split("|") if one not in KNOWN_VALUES[label]]
    return wrong if names else ["no metric at all"]


def test_there_are_three_dashboards_and_some_rules():
    assert [path.stem for path in DASHBOARDS] == ["trivium-experts", "trivium-overview", "trivium-pools"]
    assert RULES


def test_every_expression_speaks_of_what_exists():
    known = series()
    wrong = {place: wrong_in(expression, known) for place, expression in expressions().items()}
    assert {place: some for place, some in wrong.items() if some} == {}


@pytest.mark.parametrize(
    "expression, wrong",
    [
        ('sum(rate(trivium_request_failed_total{job="x"}[5m]))', "no metric trivium_request_failed_total"),
        ("trivium_ready == 0 and trivium_redy", "no metric trivium_redy"),
        ("histogram_quantile(0.9, sum by (le) (trivium_queued_seconds_buckets))", "no metric trivium_queued"),
        ("max by (nodes) (trivium_node_pages)", "no label nodes"),
        ('trivium_node_pages{kind="decode"}', "no label kind"),
        ('trivium_node_pages{pool="decoder"}', "no pool decoder"),
        ("vector(1)", "no metric at all"),
    ],
)
def test_a_wrong_name_is_found(expression: str, wrong: str):
    found = wrong_in(expression, series())
    assert len(found) == 1 and found[0].startswith(wrong)


def test_names_are_found_in_all_forms():
    expression = (
        'sum by (pool, le) (rate(a_bucket{job=~"$job", x="b_total{c}"}[$__rate_interval])) '
        "/ on (pool) group_left (d) clamp_min(e:f, 0.5e3) > bool 1 or vector(0) unless g offset 5m"
    )
    assert metric_names(expression) == {"a_bucket", "e:f", "g"}
    assert label_names(expression) == {"pool", "le", "job", "x", "d"}


def test_every_metric_is_shown_or_said_not_to_be():
    used = set().union(*map(metric_names, expressions().values()))
    used |= {name.removesuffix(suffix) for name in used for suffix in ("_bucket", "_sum", "_count")}
    every = {metric.name for metric in EVERY}
    assert every - used == UNSHOWN


def test_reasons_in_rules_are_those_that_nodes_give():
    given = set(
        re.findall(r'"([a-z_]+)"', Path("prefill/node.py").read_text() + Path("decode/node.py").read_text())
    )
    reasons = {
        reason
        for expression in expressions().values()
        for label, _, value in matchers(expression)
        if label == "reason"
        for reason in value.split("|")
    }
    assert reasons and reasons <= given


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path):
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem and dashboard["schemaVersion"] >= 39
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in panels(path):
        assert panel["title"] and len(panel["description"]) > 20
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(set(references)) == len(references)
        assert all(target["legendFormat"] for target in panel["targets"])
        assert all('job=~"$job"' in target["expr"] for target in panel["targets"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_lie_on_each_other(path: Path):
    places = [panel["gridPos"] for panel in json.loads(path.read_text())["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or apart


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_an_alert_says_what_is_wrong_and_what_to_do(path: Path):
    names = [alert["alert"] for alert in alerts(path)]
    assert len(set(names)) == len(names)
    for alert in alerts(path):
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["alert"].startswith("Trivium")
        assert alert["labels"]["severity"] in SEVERITIES
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}
        assert len(alert["annotations"]["runbook"]) >= RUNBOOK_CHARACTERS_MIN
        mentioned = set(re.findall(r"\bTrivium[A-Z]\w+", alert["annotations"]["runbook"]))
        assert mentioned <= set(names)


AGES = r"trivium_heartbeat_age_seconds"
LATE = re.compile(rf"max by \([a-z, ]+\) \((?:{AGES}|max_over_time\({AGES}\[(\d+)m\]\))\) > ([\d.]+)")
SCRAPE_S = 15


def fires(ages_s: tuple[float, ...]) -> bool:
    """Whether one node's ages, seen one after the other for ten minutes, make its alert fire."""
    [alert] = [one for path in RULES for one in alerts(path) if one["alert"] == "TriviumHeartbeatsLate"]
    [(window_min, limit_s)] = LATE.findall(alert["expr"])
    window = max(int(window_min or 0) * 60 // SCRAPE_S, 1)
    seen_s = [ages_s[at % len(ages_s)] for at in range(600 // SCRAPE_S)]
    true = [max(seen_s[max(at + 1 - window, 0) : at + 1]) > float(limit_s) for at in range(len(seen_s))]
    held = int(alert["for"].removesuffix("m")) * 60 // SCRAPE_S + 1
    return any(all(true[at : at + held]) for at in range(len(true) - held))


def test_late_heartbeats_are_told_although_each_age_is_soon_over():
    assert fires((0.3, 2.4, 0.9, 2.2))
    assert not fires((0.1, 0.4, 0.9, 1.4))
    assert not fires((0.3,) * 20 + (2.4,) + (0.3,) * 19), "once in ten minutes is no reason"


def test_a_label_in_a_summary_is_one_that_the_alert_has():
    for path in RULES:
        for alert in alerts(path):
            spoken = set(re.findall(r"\$labels\.(\w+)", json.dumps(alert["annotations"])))
            assert spoken <= label_names(alert["expr"])
