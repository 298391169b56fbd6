"""A prompt as a prefill node holds it, and the pieces of it that go into a step."""

from dataclasses import dataclass, field

import torch

from decode.messages import TokenChunk, TokenLogprob
from kernels.model.pages import pages_for
from kernels.ops.sample import SampleRow, Samples
from kernels.transport.channel import Channel
from kernels.transport.errors import AddressInvalid
from kernels.transport.sockets import is_between_devices
from kernels.transport.spans import UNTRACED, SpanLog
from prefill.messages import PRIORITY_S, PrefillPrompt


@dataclass(eq=False, slots=True)
class PrefillRequest:
    """Its pages, how far it has come, and when each thing happened."""

    asked: PrefillPrompt
    gateway: Channel
    arrived_s: float
    pages: list[int] = field(default_factory=list)
    cached_tokens_count: int = 0
    tokens_done_count: int = 0
    queued_counts: list[int] = field(default_factory=list)
    """Tokens of each layer whose latents are on their way; no entries where no latents are wanted."""
    begun_s: float = 0.0
    computed_s: float = 0.0
    last_step: int = 0
    """The batcher's step in which it last had a share, or began."""
    page_hashes: list[bytes] | None = None
    """Names of its full pages, once they were asked for."""
    place: str = UNTRACED
    """That of its prefill in its trace."""
    is_dropped: bool = False
    """Whether it has ended here, for whatever reason, so that nothing more of it is sent or told."""

    @property
    def key(self) -> tuple[str, int]:
        """Request id and generation, which no other request shares."""
        return self.asked.request_id, self.asked.generation

    @property
    def turn_s(self) -> float:
        """Place in the queue: when it came, or would have come at priority 0 to be as urgent."""
        return self.arrived_s - self.asked.priority * PRIORITY_S

    @property
    def tokens_left_count(self) -> int:
        """Tokens whose latents are still to be computed."""
        return len(self.asked.token_ids) - self.tokens_done_count

    @property
    def outputs_count(self) -> int:
        """Tokens of it that earlier attempts have brought; also the index of the token to come."""
        return len(self.asked.token_ids) - self.asked.prompt_tokens_count

    @property
    def ends_at_once(self) -> bool:
        """Whether its first token is its last for certain, so that its decode node wants no latents."""
        return self.outputs_count + 1 >= self.asked.sampling.tokens_max

    @property
    def is_prefix_queued(self) -> bool:
        """Whether the cached latents of all layers, which are queued in order, are on their way."""
        return not self.queued_counts or self.queued_counts[-1] >= self.cached_tokens_count

    @property
    def has_address(self) -> bool:
        """Whether it says where latents go in words that are understood here."""
        try:
            is_between_devices(self.asked.decode_address)
        except AddressInvalid:
            return False
        return True

    def problem(self, pages_count: int, vocab_size: int) -> str | None:
        """Why it can never be computed on a node: tried nevertheless, it would spoil the step of others."""
        token_ids = self.asked.token_ids
        if not token_ids:
            return "the prompt holds no token"
        if pages_for(len(token_ids)) > pages_count:
            return f"the prompt has {len(token_ids)} tokens, more than the {pages_count} pages here hold"
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            return f"the prompt holds token ids outside 0 to {vocab_size - 1}"
        return None

    def sample_row(self, eos_token_ids: tuple[int, ...], vocab_size: int) -> SampleRow:
        """How its next token is chosen."""
        asked = self.asked
        row = asked.sampling.row(len(asked.token_ids), self.outputs_count, eos_token_ids)
        if not asked.sampling.counts_outputs:
            return SampleRow(**row)
        prompt, outputs = torch.tensor(asked.token_ids).tensor_split([asked.prompt_tokens_count])
        counts = torch.bincount(outputs, minlength=vocab_size).to(torch.int32)
        return SampleRow(**row, prompt_token_ids=prompt, output_token_counts=counts)

    def chunk(self, samples: Samples, row: int, eos_token_ids: tuple[int, ...]) -> TokenChunk:
        """What its row of a step's samples tells its gateway: the token, and whether it is the last."""
        asked, index, token_id = self.asked, self.outputs_count, samples.token_ids[row]
        reason = asked.sampling.finish_reason(token_id, index + 1, eos_token_ids)
        found = samples.logprobs[row]
        logprobs = () if found is None else (TokenLogprob(found.chosen, tuple(found.top)),)
        return TokenChunk(asked.request_id, asked.generation, index, (token_id,), reason, logprobs)

    def note(self, spans: SpanLog) -> None:
        """Put its times into its trace."""
        under = self.asked.traceparent
        numbers = {
            "trivium.generation": self.asked.generation,
            "trivium.prompt_tokens_count": len(self.asked.token_ids),
            "trivium.cached_tokens_count": self.cached_tokens_count,
        }
        spans.record("prefill queue", under, self.arrived_s, self.begun_s)
        spans.record("prefill", under, self.begun_s, self.computed_s, self.place, **numbers)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `begin..end` of one prompt; begin is at a page border."""

    request: PrefillRequest
    begin: int
    end: int

    @property
    def tokens_count(self) -> int:
        """Tokens in this chunk."""
        return self.end - self.begin

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this chunk."""
        return self.end == len(self.request.asked.token_ids)
