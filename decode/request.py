"""A request as a decode node holds it, from its reservation to its end."""

from dataclasses import dataclass, field

import torch

from decode.messages import ReservePages
from kernels.model.pages import PAGE_TOKENS
from kernels.ops.sample import SampleRow
from kernels.transport.channel import Channel
from kernels.transport.spans import UNTRACED, SpanLog, place_under


@dataclass(eq=False, slots=True)
class DecodeRequest:
    """Its pages, its tokens so far, and where its next tokens go."""

    asked: ReservePages
    gateway: Channel
    pages: list[int]
    lease_end_s: float
    latents_counts: list[int]
    """Tokens whose latents are here, layer by layer."""
    token_ids: list[int] = field(default_factory=list)
    first_token_known: bool = False
    receiving_count: int = 0
    cancelled: bool = False
    prefill: Channel | None = None
    page_table: torch.Tensor | None = None
    """Its pages as int32, from `begin` on."""
    prompt_token_ids: torch.Tensor | None = None
    """The client's prompt, where a penalty asks for it."""
    output_counts: torch.Tensor | None = None
    reserved_s: float = 0.0
    begun_s: float = 0.0
    place: str = UNTRACED
    """That of its decoding in its trace."""

    @property
    def is_complete(self) -> bool:
        """Whether every layer's latents and the first token are here."""
        prompt_count = len(self.asked.token_ids)
        return self.first_token_known and all(count == prompt_count for count in self.latents_counts)

    @property
    def outputs_count(self) -> int:
        """Tokens generated so far, on this node and before it."""
        return len(self.token_ids) - self.asked.prompt_tokens_count

    @property
    def position(self) -> int:
        """Position of the newest token, whose latent the next step computes."""
        return len(self.token_ids) - 1

    @property
    def is_at_first_step(self) -> bool:
        """Whether the next step here is its first."""
        return len(self.token_ids) == len(self.asked.token_ids) + 1

    def begin(self, vocab_size: int, now_s: float) -> None:
        """Prepare for the first step: the table of pages, and what penalties are reckoned from."""
        self.begun_s, self.place = now_s, place_under(self.asked.traceparent)
        prompt_count, sampling = self.asked.prompt_tokens_count, self.asked.sampling
        self.page_table = torch.tensor(self.pages, dtype=torch.int32)
        if sampling.repetition_penalty != 1.0:
            self.prompt_token_ids = torch.tensor(self.token_ids[:prompt_count], dtype=torch.int64)
        if sampling.counts_outputs:
            outputs = torch.tensor(self.token_ids[prompt_count:], dtype=torch.int64)
            self.output_counts = torch.bincount(outputs, minlength=vocab_size).to(torch.int32)

    def next_slot(self) -> int:
        """Slot that the newest token's latent goes to."""
        page, offset = divmod(self.position, PAGE_TOKENS)
        return self.pages[page] * PAGE_TOKENS + offset

    def sample_row(self, eos_token_ids: tuple[int, ...]) -> SampleRow:
        """How this request's next token is to be chosen."""
        return SampleRow(
            **self.asked.sampling.row(len(self.token_ids), self.outputs_count, eos_token_ids),
            prompt_token_ids=self.prompt_token_ids,
            output_token_counts=self.output_counts,
        )

    def append(self, token_id: int) -> None:
        """Take the next token."""
        self.token_ids.append(token_id)
        if self.output_counts is not None:
            self.output_counts[token_id] += 1

    def note(self, spans: SpanLog, now_s: float) -> None:
        """Put its decoding, which ends now, into its trace."""
        numbers = {
            "trivium.generation": self.asked.generation,
            "trivium.tokens_count": len(self.token_ids) - len(self.asked.token_ids),
        }
        spans.record("decode", self.asked.traceparent, self.begun_s, now_s, self.place, **numbers)
