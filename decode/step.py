"""One forward pass of a decode node: one new token for each request, attending over latents in pages."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from decode.batcher import split_evenly
from decode.request import DecodeRequest
from kernels.model.attention import LatentAttention
from kernels.model.latent_cache import LatentCache
from kernels.model.transformer import Lane, Transformer, run_lanes

LANE_REQUESTS_MIN = 4  # fewer are not worth a second round of dispatches


class DecodeStep:
    """Carries a batch through the model in micro-batches that alternate between computing and travelling."""

    def __init__(self, transformer: Transformer, cache: LatentCache, micro_batches: int):
        self.transformer = transformer
        self.cache = cache
        self.micro_batches = micro_batches

    @torch.inference_mode()
    def run(self, batch: Sequence[DecodeRequest]) -> torch.Tensor:
        """Logits `[requests, vocab]` float32 of the token after each request's newest."""
        parts = split_evenly(list(batch), self.micro_batches, LANE_REQUESTS_MIN)
        hidden = torch.cat(run_lanes([self._lane(part) for part in parts]))
        return self.transformer.logits(hidden)

    def _lane(self, requests: Sequence[DecodeRequest]) -> Lane:
        positions = torch.tensor([request.position for request in requests])
        rotation = self.transformer.rotation(positions)
        slots = torch.tensor([request.next_slot() for request in requests])
        pages = pad_sequence([request.page_table for request in requests], batch_first=True)
        lengths = (positions + 1).to(torch.int32)

        def attend(layer: int, attention: LatentAttention, normed: torch.Tensor) -> torch.Tensor:
            queries, latents = attention.compress(normed, rotation)
            self.cache.write(layer, slots, latents)
            return attention.absorb(queries, self.cache.pages_of(layer), pages, lengths)

        hidden = self.transformer.embed([request.token_ids[-1] for request in requests])
        return self.transformer.lane(hidden, attend)
