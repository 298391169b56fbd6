"""Places in traces, and the log of what was done under them."""

import time

import pytest

from kernels.transport import spans
from kernels.transport.spans import SpanLog, begin_trace, is_sampled, is_traceparent, place_under, span_id_of


def test_a_place_is_one_of_the_w3c_form():
    place = begin_trace()
    assert is_traceparent(place) and is_sampled(place)
    assert len(place) == 55


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        7,
        b"00-" + b"1" * 32,
        f"00-{0:032x}-{1:016x}-01",
        f"00-{1:032x}-{0:016x}-01",
        f"01-{1:032x}-{1:016x}-01",
        f"00-{1:032X}A-{1:016x}-01",
        f"00-{1:032x}-{1:016x}-01\n",
        f" 00-{1:032x}-{1:016x}-01",
    ],
)
def test_what_is_no_place(text):
    assert not is_traceparent(text)


def test_a_client_may_not_want_its_call_traced():
    assert not is_sampled(f"00-{1:032x}-{1:016x}-00")
    assert is_sampled(f"00-{1:032x}-{1:016x}-03")


def test_a_place_under_another_is_in_the_same_trace():
    above = begin_trace()
    below = place_under(above)
    assert is_traceparent(below)
    assert spans.trace_id_of(below) == spans.trace_id_of(above)
    assert span_id_of(below) != span_id_of(above)
    assert place_under("") == ""


def test_what_nobody_traces_is_not_noted():
    log = SpanLog()
    log.record("step", "", 0.0, 1.0)
    assert log.take() == []


def test_a_span_says_when_and_under_what():
    log, above = SpanLog(), begin_trace()
    here = place_under(above)
    now_s = time.monotonic()
    log.record("outer", above, now_s - 1.0, now_s, here, layer=3)
    log.record("inner", here, now_s - 0.5, now_s)
    log.record("root", above, now_s, now_s, above)
    outer, inner, root = log.take()
    assert (outer.name, outer.parent_id, outer.attributes) == ("outer", span_id_of(above), {"layer": 3})
    assert inner.parent_id == outer.span_id == span_id_of(here)
    assert (root.span_id, root.parent_id) == (span_id_of(above), "")
    assert outer.end_s - outer.begin_s == pytest.approx(1.0, abs=1e-3)
    assert abs(outer.end_s - time.time()) < 5
    assert log.take() == []


def test_a_log_that_nobody_takes_keeps_the_newest(monkeypatch):
    log, place = SpanLog(), begin_trace()
    for number in range(spans.SPANS_KEPT_MAX + 3):
        log.record("step", place, 0.0, 1.0, number=number)
    kept = log.take()
    assert len(kept) == spans.SPANS_KEPT_MAX
    assert kept[0].attributes == {"number": 3}
