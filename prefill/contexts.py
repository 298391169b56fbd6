"""What the chunks of a step attend to, where many are attended to at once: on a GPU.

A token's context is cut in windows that begin at multiples of `WINDOW_TOKENS` of its own prompt; each is
unfolded into keys and values, attended to, and merged in order. So a token's bits depend on its own prompt
alone: not on where chunks were cut, how much came from the cache, or what else is in the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from kernels.model.attention import KeyWindow, WindowedQueries
from kernels.model.latent_cache import as_index, slots_of
from prefill.request import Chunk

WINDOW_TOKENS = 1 << 15  # unfolded for V3: 2 GiB in bfloat16


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `begin..end` of one prompt that lie in one window."""

    pages: Sequence[int]
    begin: int
    end: int

    @property
    def tokens_count(self) -> int:
        """Tokens that ask."""
        return self.end - self.begin


def contexts_of(
    chunks: Sequence[Chunk], device: torch.device, window_tokens: int = WINDOW_TOKENS
) -> list[WindowedQueries]:
    """The contexts of chunks whose tokens are the rows of a step, one chunk after the other."""
    contexts, row = [], 0
    for group in grouped(list(spans_of(chunks, window_tokens)), window_tokens):
        counts = [span.tokens_count for span in group]
        rows = slice(row, row + sum(counts))
        windows = list(windows_of(group, device, window_tokens))
        contexts.append(WindowedQueries(rows, starts_of(counts, device), max(counts), windows))
        row = rows.stop
    return contexts


def spans_of(chunks: Sequence[Chunk], window_tokens: int) -> Iterator[Span]:
    """Chunks cut where windows begin."""
    for chunk in chunks:
        first = chunk.begin // window_tokens + 1
        cuts = range(first * window_tokens, chunk.end, window_tokens)
        for begin, end in pairwise([chunk.begin, *cuts, chunk.end]):
            yield Span(chunk.request.pages, begin, end)


def grouped(spans: Sequence[Span], window_tokens: int) -> list[list[Span]]:
    """Spans that are attended for together: first windows that fit into one; others alone."""
    groups: list[list[Span]] = []
    room = 0
    for span in spans:
        if span.end <= room and groups:
            groups[-1].append(span)
        else:
            groups.append([span])
            room = window_tokens if span.end <= window_tokens else 0
        room -= span.end
    return groups


def windows_of(group: Sequence[Span], device: torch.device, window_tokens: int) -> Iterator[KeyWindow]:
    """What the spans of a group attend to: the windows before theirs, then their own up to each token."""
    own = group[0].begin // window_tokens * window_tokens
    for begin in range(0, own + 1, window_tokens):
        ends = [span.end if begin == own else begin + window_tokens for span in group]
        slots = [as_index(slots_of(span.pages, begin, end)) for span, end in zip(group, ends, strict=True)]
        starts = starts_of([end - begin for end in ends], device)
        yield KeyWindow(torch.cat(slots).to(device), starts, is_causal=begin == own)


def starts_of(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where each of so many tokens begins, and the end, `[counts + 1]` int32."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
