"""Which requests are traced, and what their spans say."""

import pytest

from cluster.errors import Overloaded
from cluster.events import FinishRequest, Phases
from cluster.request_trace import RequestTraces
from cluster.validation import RequestedGeneration, RequestedSampling, RequestLimits, validate
from kernels.transport.spans import SpanLog, begin_trace, span_id_of, trace_id_of

CLIENTS = begin_trace()


def traced(share: float, sent: object = None, draw: float = 0.5):
    """A trace that has begun, and its log."""
    log = SpanLog()
    return RequestTraces(log, share, "small").begin(sent, 10.0, draw), log


@pytest.mark.parametrize(
    ("share", "draw", "is_traced"), [(0.0, 0.0, False), (0.4, 0.5, False), (1.0, 0.99, True)]
)
def test_a_share_of_the_requests_is_traced(share, draw, is_traced):
    trace, log = traced(share, draw=draw)
    trace.end(11.0)
    assert bool(trace.place) == is_traced == bool(log.take())


def test_a_client_decides_for_its_own_calls():
    trace, log = traced(0.01, CLIENTS, draw=0.99)
    trace.end(11.0)
    [span] = log.take()
    assert (span.trace_id, span.parent_id) == (trace_id_of(CLIENTS), span_id_of(CLIENTS))
    assert span.span_id == span_id_of(trace.place) != span_id_of(CLIENTS)
    unwanted, log = traced(1.0, CLIENTS[:-2] + "00", draw=0.0)
    unwanted.end(11.0)
    assert not unwanted.place and not log.take()


@pytest.mark.parametrize("sent", ["nonsense", b"\x00", 5, ""])
def test_nonsense_from_a_client_is_as_nothing(sent):
    trace, log = traced(1.0, sent)
    trace.end(11.0)
    [span] = log.take()
    assert span.parent_id == ""


def test_nothing_is_traced_where_nobody_collects():
    trace, log = traced(0.0, CLIENTS)
    trace.end(11.0)
    assert not trace.place and not log.take()


def test_a_span_says_what_was_asked_and_given():
    trace, log = traced(1.0)
    sampling = RequestedSampling(tokens_max=8, seed=5)
    requested = RequestedGeneration(token_ids=(1, 2, 3), sampling=sampling, client_request_id="job 7")
    trace.asked(requested, validate(requested, RequestLimits(100, 50, 16), 5, None), "id")
    trace.finished(FinishRequest("id", "length", 2, Phases(0.1, 0.2, 0.3, 0.4, 0.7)), 8)
    trace.end(11.0)
    [span] = log.take()
    said = span.attributes
    assert said["gen_ai.operation.name"] == "text_completion"
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (3, 8)
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.model"]) == (8, "small")
    assert said["trivium.client_request_id"] == "job 7"
    assert "error.type" not in said


def test_a_span_says_why_a_request_failed():
    trace, log = traced(1.0)
    trace.failed(Overloaded("TOO_MANY_WAITING", "full"))
    trace.end(11.0)
    [span] = log.take()
    assert span.attributes["error.type"] == "TOO_MANY_WAITING"
