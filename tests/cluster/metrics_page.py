"""The page on metrics, out of the table of them; `python -m tests.cluster.metrics_page` writes it."""

from pathlib import Path

from cluster.metric_name import MetricName
from cluster.metric_names import GROUPS

PAGE = Path("docs/metrics.md")

HEAD = """# Metrics

Two places publish them, in Prometheus' text or as OpenMetrics, whichever the scraper asks for:

- the **coordinator**, at `http://HOST:8266/metrics` (`operations.host` and `operations.port`): all of the
  cluster. Members count for themselves and tell it with each heartbeat, so when a coordinator dies no counts
  are lost but its own;
- each **gateway**, at `gateway.metrics_port` if that is set: its own requests, and the aliases at the end of
  this page, by which inference gateways choose between endpoints.

Both publish a gateway's requests under the same names. Scrape both only under different values of `job`: the
dashboards in `helm/dashboards/` show one job, and the rules in `helm/rules/` count a `node` once, however
often it is scraped. With `operations.ray_metrics`, Ray's exporter has all that the coordinator has as gauges,
their names behind `ray_`.

Times are seconds, sizes bytes, shares 0 to 1. Counters and histograms are of all time since the process named
by `node` began. Its series end with it, so a sum over nodes falls when one leaves: take `rate` first, `sum`
after. Counters without `node` are the coordinator's own and begin at 0 with it.

| label | values |
|---|---|
| `pool` | what an actor serves as: `gateway`, `prefill`, `decode`, `experts` |
| `node` | name of a gateway, node or shard, new with each start; at a time as many as there are actors |
| `state` | of actors: `starting`, `ready`, `draining`; of pages: `free`, `cached`, `leased` |
| `reason` | of finishes: `stop`, `length`, `stop_string`; of failures at most 16, and `other` |
| `layers` | `mean`: of all layers; `worst`: of the one least even |
| `cause` | what was measured of a pool, such as `pages` or `busy` |

Percentiles come from histograms with six bounds to the decade, so they are true to about a tenth; means are
exact.
"""


def page() -> str:
    """The whole page."""
    sections = (
        f"\n## {title}\n\n| name | type | labels | unit | meaning |\n|---|---|---|---|---|\n"
        + "".join(map(_row, metrics))
        for title, metrics in GROUPS.items()
    )
    return HEAD + "".join(sections)


def _row(metric: MetricName) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.unit} | {metric.meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
