"""The span of a whole generation, under which every other process's spans of it are.

Names of attributes are those of OpenTelemetry's semantic conventions for generative AI.
"""

from cluster.errors import TriviumError
from cluster.events import FinishRequest
from cluster.validation import RequestedGeneration, ValidRequest
from kernels.transport.spans import (
    UNTRACED,
    AttributeValue,
    SpanLog,
    begin_trace,
    is_sampled,
    is_traceparent,
    place_under,
)

TRACEPARENT = "traceparent"
"""Metadata in which a client says where in a trace of its own its call is (W3C trace context)."""


class RequestTrace:
    """What is noted of one request from its call to its end; nothing where nobody traces it."""

    def __init__(self, log: SpanLog, under: str, place: str, begin_s: float, model: str):
        self.place = place
        self._log = log
        self._under = under
        self._begin_s = begin_s
        self._attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "trivium",
            "gen_ai.request.model": model,
        }

    def asked(self, requested: RequestedGeneration, valid: ValidRequest, request_id: str) -> None:
        """Note what was asked for."""
        sampling = valid.sampling
        self._attributes |= {
            "gen_ai.operation.name": "chat" if requested.messages else "text_completion",
            "gen_ai.response.id": request_id,
            "trivium.client_request_id": valid.client_request_id,
            "gen_ai.request.max_tokens": sampling.tokens_max,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.usage.input_tokens": len(valid.token_ids),
        }

    def finished(self, finish: FinishRequest, outputs_count: int) -> None:
        """Note how it ended."""
        self._attributes |= {
            "gen_ai.response.finish_reasons": (finish.finish_reason,),
            "gen_ai.usage.output_tokens": outputs_count,
            "gen_ai.usage.cache_read.input_tokens": finish.cached_tokens_count,
            "trivium.queued_s": finish.phases.queued_s,
            "trivium.prefill_s": finish.phases.prefill_s,
            "trivium.transfer_s": finish.phases.transfer_s,
            "trivium.decode_s": finish.phases.decode_s,
        }

    def failed(self, error: BaseException) -> None:
        """Note why it did not end well."""
        self._attributes["error.type"] = (
            error.reason if isinstance(error, TriviumError) else type(error).__name__
        )

    def end(self, now_s: float) -> None:
        """Nothing more happens to it."""
        self._log.record("generate", self._under, self._begin_s, now_s, self.place, **self._attributes)


class RequestTraces:
    """Chooses which requests of a gateway are traced."""

    def __init__(self, log: SpanLog, share: float, model: str):
        """`share` of the requests whose client has not decided are traced, and none at all where it is 0."""
        self._log = log
        self._share = share
        self._model = model

    def begin(self, sent: object, now_s: float, draw: float) -> RequestTrace:
        """A request has come with a `traceparent` or none; `draw` is a random number in [0, 1)."""
        under, place = self._places(sent, draw)
        return RequestTrace(self._log, under, place, now_s, self._model)

    def _places(self, sent: object, draw: float) -> tuple[str, str]:
        if self._share > 0 and is_traceparent(sent):
            return (sent, place_under(sent)) if is_sampled(sent) else (UNTRACED, UNTRACED)
        place = begin_trace() if draw < self._share else UNTRACED
        return place, place
