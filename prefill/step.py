"""One forward pass of a prefill node: chunks of several prompts at once, latents leaving layer by layer."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from kernels.model.attention import LatentAttention
from kernels.model.latent_cache import LatentCache, as_index, slots_of
from kernels.model.pages import PAGE_TOKENS
from kernels.model.transformer import Lane, Transformer, run_lanes
from kernels.ops.backend import runs_kernel
from kernels.ops.projection import Rows
from prefill.contexts import contexts_of
from prefill.request import Chunk

LANE_TOKENS_MIN = 128  # fewer are not worth a second round of dispatches

OnLatents = Callable[[Chunk, int, torch.Tensor], None]
"""(chunk, layer, latents [chunk's tokens, row] as the cache holds them), called as soon as they are known."""


class PrefillStep:
    """Carries chunks through the model in micro-batches that alternate between computing and travelling."""

    def __init__(self, transformer: Transformer, cache: LatentCache, micro_batches: int):
        self.transformer = transformer
        self.cache = cache
        self.micro_batches = micro_batches

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], on_latents: OnLatents) -> torch.Tensor:
        """Logits `[ending, vocab]` float32 of the first token of each prompt that ends with a chunk."""
        pieces, hidden = self.hidden(chunks, on_latents)
        ends = accumulate(chunk.tokens_count for chunk in pieces)
        row_of = {
            id(piece.request): end - 1 for piece, end in zip(pieces, ends, strict=True) if piece.is_last
        }
        rows = [row_of[id(chunk.request)] for chunk in chunks if chunk.is_last]
        return self.transformer.logits(hidden[rows]) if rows else hidden.new_empty(0, 0)

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk], on_latents: OnLatents) -> tuple[list[Chunk], torch.Tensor]:
        """The last layer's `[tokens, hidden]`, and the pieces of chunks in the order of its rows."""
        parts = split_chunks(chunks, self.micro_batches)
        hidden = torch.cat(run_lanes([self._lane(part, on_latents) for part in parts]))
        return [chunk for part in parts for chunk in part], hidden

    def prefix_slots(self, pages: Sequence[int], tokens_count: int) -> slice | torch.Tensor:
        """Where the pages hold the first so many tokens: for `cached_latents` of every layer."""
        slots = slots_of(pages, 0, tokens_count)
        return slots if isinstance(slots, slice) else slots.to(self.transformer.device)

    @torch.inference_mode()
    def cached_latents(self, slots: slice | torch.Tensor, layer: int) -> torch.Tensor:
        """A copy of what one layer holds there, `[tokens, row]`."""
        latents = self.cache.read(layer, slots)
        return latents.clone() if isinstance(slots, slice) else latents  # an index has copied already

    def _lane(self, chunks: Sequence[Chunk], on_latents: OnLatents) -> Lane:
        borders = [0, *accumulate(chunk.tokens_count for chunk in chunks)]
        rows = [slice(begin, end) for begin, end in pairwise(borders)]
        device = self.transformer.device
        positions = torch.cat([torch.arange(chunk.begin, chunk.end) for chunk in chunks])
        rotation = self.transformer.rotation(positions.to(device))
        places = [slots_of(chunk.request.pages, chunk.begin, chunk.end) for chunk in chunks]
        slots = torch.cat([as_index(place) for place in places]).to(device)
        windowed, contexts = None, []
        if runs_kernel(self.cache.latents):
            windowed = contexts_of(chunks, device)
        else:
            contexts = [slots_of(chunk.request.pages, 0, chunk.end) for chunk in chunks]

        def attend(layer: int, attention: LatentAttention, normed: Rows) -> torch.Tensor:
            queries, fresh = attention.compress(normed, rotation)
            attention.store(fresh, rotation, self.cache.latents[layer], slots)
            stored = self.cache.read(layer, slots)  # a copy: pages may be another's before it is sent
            for chunk, some in zip(chunks, rows, strict=True):
                on_latents(chunk, layer, stored[some])
            if windowed is not None:
                return attention.expand_windows(queries, self.cache.latents[layer], windowed)
            mixed = [
                attention.expand(queries[some], self.cache.read(layer, context))
                for some, context in zip(rows, contexts, strict=True)
            ]
            return torch.cat(mixed)

        token_ids = [
            token for chunk in chunks for token in chunk.request.asked.token_ids[chunk.begin : chunk.end]
        ]
        hidden = self.transformer.embed(torch.tensor(token_ids, device=device))
        return self.transformer.lane(hidden, attend, self.transformer.routed)


def split_chunks(chunks: Sequence[Chunk], parts_count: int) -> list[list[Chunk]]:
    """Chunks in up to two parts of near equal tokens, in order; one may be cut in two at a page border.

    The later part of a cut prompt attends to the earlier one, which goes first through every layer.
    """
    tokens_count = sum(chunk.tokens_count for chunk in chunks)
    half = -(-tokens_count // (2 * PAGE_TOKENS)) * PAGE_TOKENS
    if parts_count < 2 or half < LANE_TOKENS_MIN or half >= tokens_count:
        return [list(chunks)]
    first: list[Chunk] = []
    second: list[Chunk] = []
    room = half
    for chunk in chunks:
        cut = min(chunk.tokens_count, room)
        if cut < chunk.tokens_count:
            cut -= cut % PAGE_TOKENS
        if cut:
            first.append(Chunk(chunk.request, chunk.begin, chunk.begin + cut))
        if cut < chunk.tokens_count:
            second.append(Chunk(chunk.request, chunk.begin + cut, chunk.end))
        room -= cut
    return [part for part in (first, second) if part]
