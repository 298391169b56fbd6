"""What is known of a metric before it has a value: its name, what it means, which field of a report it is.

Counters and histograms are of all time since the process that they are about began. Its name is their label
`node`: the series of a process that has gone end with it, and no other ever falls. Counters without `node`
are the coordinator's own, and begin anew with it.
"""

from dataclasses import dataclass

COUNTER, GAUGE, HISTOGRAM, INFO = "counter", "gauge", "histogram", "info"


@dataclass(frozen=True, slots=True)
class MetricName:
    """One metric; `field` is what its value is called in the report, where one field is the whole value."""

    name: str
    kind: str
    labels: tuple[str, ...]
    unit: str
    meaning: str
    field: str = ""


def metrics_of(kind: str, labels: tuple[str, ...], *rows: tuple[str, ...]) -> tuple[MetricName, ...]:
    """Metrics of one kind with the same labels; a row is name, unit, meaning and, if there is one, field."""
    return tuple(MetricName(name, kind, labels, *rest) for name, *rest in rows)
