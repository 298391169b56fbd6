"""A request as the router holds it, from its admission to its end."""

from dataclasses import dataclass, field
from enum import Enum

from cluster.events import Phases, RoutedRequest
from decode.messages import ReservePages, TokenChunk, TokenLogprob
from kernels.model.pages import pages_for
from prefill.messages import PRIORITY_S, PrefillPrompt


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RESERVING = "reserving"
    PREFILLING = "prefilling"
    DECODING = "decoding"


@dataclass
class Route:
    """A request under way: which attempt this is, on which nodes, and what has come of it."""

    request: RoutedRequest
    admitted_s: float
    number: int
    """Of two admitted in the same moment the one with the lower number is older."""
    hashes: list[bytes]
    phase: Phase = Phase.WAITING
    generation: int = 0
    attempts_count: int = 0
    """Attempts that failed since one last decoded something."""
    prefill: str = ""
    decode: str = ""
    tokens_sent_count: int = 0
    """Length of this attempt's prompt, as counted on its prefill node."""
    avoids: tuple[str, ...] = ()
    """Nodes on which the last attempt failed: taken only if there are no others."""
    outputs: list[int] = field(default_factory=list)
    early: dict[int, TokenChunk] = field(default_factory=dict)
    """Chunks of this attempt that overtook an earlier one."""
    cached_tokens_count: int = 0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    first_token_s: float = 0.0
    is_handed_over: bool = False
    """Whether the decode node has all the latents."""

    @property
    def turn(self) -> tuple[float, int, str]:
        """Place in the queue: the older first, priority counted as age; ends in the request's id."""
        request = self.request
        return self.admitted_s - request.priority * PRIORITY_S, self.number, request.request_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt of the next attempt: the client's, and what was generated."""
        return (*self.request.token_ids, *self.outputs)

    @property
    def tokens_count(self) -> int:
        """Length of the prompt of the next attempt."""
        return len(self.request.token_ids) + len(self.outputs)

    @property
    def pages_wanted_count(self) -> int:
        """Pages for the prompt and all outputs."""
        return pages_for(len(self.request.token_ids) + self.request.sampling.tokens_max)

    @property
    def needs_prefill(self) -> bool:
        """Whether the prefill node still has something that nobody else has: latents, or the first token."""
        return self.phase in (Phase.RESERVING, Phase.PREFILLING) or not self.is_handed_over

    def reservation(self) -> ReservePages:
        """What this attempt asks of its decode node."""
        asked = self.request
        prompt = (self.token_ids, len(asked.token_ids), asked.sampling)
        return ReservePages(asked.request_id, self.generation, *prompt, asked.traceparent)

    def prompt(self, decode_address: str) -> PrefillPrompt:
        """What this attempt asks of its prefill node, once latents may go to `decode_address`."""
        asked = self.request
        prompt = (self.token_ids, len(asked.token_ids), asked.sampling, decode_address)
        return PrefillPrompt(asked.request_id, self.generation, *prompt, asked.priority, asked.traceparent)

    def asks(self, name: str) -> bool:
        """Whether a decode node was asked for room, and has not answered."""
        return self.phase is Phase.RESERVING and self.decode == name

    def take(self, chunk: TokenChunk) -> TokenChunk:
        """What is due of the outputs, now that a chunk has come: nothing yet, or also what overtook it."""
        first, reason = len(self.outputs), None
        if chunk.index >= first:
            self.early[chunk.index] = chunk
        logprobs: list[TokenLogprob] = []
        while (following := self.early.pop(len(self.outputs), None)) is not None:
            self.outputs.extend(following.token_ids)
            logprobs.extend(following.logprobs)
            reason = following.finish_reason
        tokens = tuple(self.outputs[first:])
        return TokenChunk(chunk.request_id, self.generation, first, tokens, reason, tuple(logprobs))

    def phases(self, now_s: float) -> Phases:
        """Where its seconds went until now: queued, prefill and decode add up to the total.

        Transfer overlaps decode, and so does all that a later attempt takes.
        """
        first_s = self.first_token_s if self.outputs else now_s
        queued_s = max(first_s - self.admitted_s - self.prefill_s, 0.0)
        return Phases(queued_s, self.prefill_s, self.transfer_s, now_s - first_s, now_s - self.admitted_s)
