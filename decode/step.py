"""One forward pass of a decode node: one new token for each request, attending over latents in pages."""

from collections.abc import Callable, Sequence

import torch

from decode.batcher import split_evenly
from decode.graphs import GraphedLanes, Recorder
from decode.request import DecodeRequest
from decode.step_inputs import PAGES_MIN, StepInputs, bucket_of
from kernels.model.attention import LatentAttention
from kernels.model.latent_cache import LatentCache
from kernels.model.moe import RoutedExperts
from kernels.model.transformer import Lane, Transformer, run_lanes

LANE_REQUESTS_MIN = 4  # fewer are not worth a second round of dispatches


class DecodeStep:
    """Carries a batch through the model in micro-batches that alternate between computing and travelling."""

    def __init__(
        self,
        transformer: Transformer,
        cache: LatentCache,
        micro_batches: int,
        make_recorder: Callable[[], Recorder] | None = None,
    ):
        """With a recorder lanes are recorded once for each size, and played from then on."""
        self.transformer = transformer
        self.cache = cache
        self.micro_batches = micro_batches
        self._graphs = None
        if make_recorder is not None:
            self._graphs = GraphedLanes(self._lane_of, transformer.routed, make_recorder)

    @torch.inference_mode()
    def prepare(self, requests_max: int) -> None:
        """Record steps of short contexts, of one to so many requests, before a request waits for it."""
        if self._graphs is None:
            return
        for rows in sorted({bucket_of(rows) for rows in range(1, requests_max + 1)}, reverse=True):
            for number in range(self.micro_batches):
                self._graphs.prepare(number, StepInputs.blank(rows, PAGES_MIN, self.transformer.device))

    @torch.inference_mode()
    def run(self, batch: Sequence[DecodeRequest]) -> torch.Tensor:
        """Logits `[requests, vocab]` float32 of the token after each request's newest."""
        parts = split_evenly(list(batch), self.micro_batches, LANE_REQUESTS_MIN)
        hidden = torch.cat(run_lanes([self._lane(number, part) for number, part in enumerate(parts)]))
        return self.transformer.logits(hidden)

    def _lane(self, number: int, requests: Sequence[DecodeRequest]) -> Lane:
        inputs = StepInputs.of(requests, self.transformer.device)
        if self._graphs is not None:
            return self._graphs.lane(number, inputs)
        return self._lane_of(inputs, self.transformer.routed)

    def _lane_of(self, inputs: StepInputs, routed: RoutedExperts) -> Lane:
        rotation = self.transformer.rotation(inputs.positions)

        def attend(layer: int, attention: LatentAttention, normed: torch.Tensor) -> torch.Tensor:
            queries, fresh = attention.compress(normed, rotation)
            attention.store(fresh, rotation, self.cache.latents[layer], inputs.slots)
            return attention.absorb(queries, self.cache.pages_of(layer), inputs.pages, inputs.lengths)

        return self.transformer.lane(self.transformer.embed(inputs.token_ids), attend, routed)
