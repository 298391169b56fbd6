"""One forward pass of a decode node: one new token for each request, attending over latents in pages."""

from collections.abc import Callable, Iterable, Sequence

import torch

from decode.batcher import split_evenly
from decode.graphs import GraphedLanes, Recorder
from decode.request import DecodeRequest
from decode.step_inputs import StepInputs, bucket_of
from kernels.model.attention import LatentAttention
from kernels.model.latent_cache import LatentCache
from kernels.model.moe import RoutedExperts
from kernels.model.pages import pages_for
from kernels.model.transformer import Lane, Transformer, run_lanes
from kernels.ops.projection import Rows

LANE_REQUESTS_MIN = 8  # fewer cost more, in calls and in weights read twice, than overlapping hides
SHORT_PAGES = 64  # 4,096 tokens


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
            # what is beyond a request's own pages costs attention next to nothing
            longest = min(pages_for(transformer.config.positions_max), cache.pool.pages_count)
            levels = sorted({min(SHORT_PAGES, longest), longest})
            self._graphs = GraphedLanes(self._lane_of, transformer.routed, make_recorder, levels)

    @torch.inference_mode()
    def prepare(self, batches: Iterable[int]) -> bool:
        """Record the steps of batches of so many requests, the largest first; whether all are recorded."""
        if self._graphs is None:
            return False
        sizes = sorted(lane_sizes(batches, self.micro_batches), reverse=True)
        return self._graphs.prepare(sizes, self.transformer.device)

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

        def attend(layer: int, attention: LatentAttention, normed: Rows) -> torch.Tensor:
            queries, fresh = attention.compress(normed, rotation)
            attention.store(fresh, rotation, self.cache.latents[layer], inputs.slots)
            return attention.absorb(queries, self.cache.pages_of(layer), inputs.pages, inputs.lengths)

        return self.transformer.lane(self.transformer.embed(inputs.token_ids), attend, routed)


def lane_sizes(batches: Iterable[int], micro_batches: int) -> set[tuple[int, int]]:
    """(lane, recorded rows) of all lanes of batches of so many requests."""
    split = (split_evenly(list(range(count)), micro_batches, LANE_REQUESTS_MIN) for count in batches)
    return {(number, bucket_of(len(part))) for parts in split for number, part in enumerate(parts)}
