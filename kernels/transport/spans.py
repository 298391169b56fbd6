"""Who did what for a traced request, and when: plain records, which whoever runs the process publishes.

A place in a trace travels as the text of the W3C header `traceparent`; empty means that nobody traces.
"""

import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

UNTRACED = ""
SPANS_KEPT_MAX = 4096
FORM = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
SAMPLED = 0x01

AttributeValue = str | int | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Something done for a request: within what, from when to when (seconds since 1970)."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for the first of a trace."""
    begin_s: float
    end_s: float
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


def is_traceparent(text: object) -> bool:
    """Whether a text from outside is a place in a trace."""
    return isinstance(text, str) and FORM.fullmatch(text) is not None


def is_sampled(traceparent: str) -> bool:
    """Whether whoever sent a place in a trace wants it traced."""
    return bool(int(traceparent[-2:], 16) & SAMPLED)


def begin_trace() -> str:
    """A place in a new trace, under which nothing has been done yet."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def place_under(traceparent: str) -> str:
    """A new place in the same trace, for what is done in several processes under one span."""
    return f"00-{trace_id_of(traceparent)}-{secrets.token_hex(8)}-01" if traceparent else UNTRACED


def trace_id_of(traceparent: str) -> str:
    """The trace, 32 hexadecimal digits."""
    return traceparent[3:35]


def span_id_of(traceparent: str) -> str:
    """The span, 16 hexadecimal digits."""
    return traceparent[36:52]


class SpanLog:
    """Spans that have ended in this process, until somebody takes them; the oldest go when nobody does."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=SPANS_KEPT_MAX)
        self._lock = threading.Lock()

    def record(
        self,
        name: str,
        under: str,
        begin_s: float,
        end_s: float,
        place: str = UNTRACED,
        **attributes: AttributeValue,
    ) -> None:
        """Note what was done under a place in a trace; times are of `time.monotonic`.

        `place` is that of the span itself, where others were told of it while it lasted.
        """
        if not under:
            return
        since_1970_s = time.time() - time.monotonic()
        place = place or place_under(under)
        parent_id = span_id_of(under) if under != place else ""
        span = Span(
            name,
            trace_id_of(place),
            span_id_of(place),
            parent_id,
            begin_s + since_1970_s,
            end_s + since_1970_s,
            attributes,
        )
        with self._lock:
            self._spans.append(span)

    def take(self) -> list[Span]:
        """All spans since the last time."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        return spans
