"""A prompt's bits depend on the prompt alone: not on chunks, micro-batches, cached pages or company."""

from itertools import pairwise

import pytest
import torch

from decode.messages import SamplingParameters
from kernels.model.latent_cache import LatentCache, page_runs, slots_of
from kernels.model.pages import PAGE_TOKENS, pages_for
from prefill.messages import PrefillPrompt
from prefill.request import Chunk, PrefillRequest
from prefill.step import PrefillStep, split_chunks
from tests.checkpoints import random_prompt
from tests.fixtures import CHECKPOINT

PAGES = 24
PROMPT = 330


class Bench:
    """A step over poisoned pages, and all latents that it gave away."""

    def __init__(self, transformer, micro_batches=1):
        model = transformer.config
        page_bytes = model.layers_count * PAGE_TOKENS * model.latent_dim * 4
        self.cache = LatentCache(model.layers_count, transformer.latent_layout(False), PAGES * page_bytes)
        self.cache.latents.fill_(float("nan"))
        self.step = PrefillStep(transformer, self.cache, micro_batches)
        self.given: list[tuple[Chunk, int, torch.Tensor]] = []

    def begin(self, tokens_count, pages=None, token_ids=None) -> PrefillRequest:
        token_ids = token_ids or random_prompt(CHECKPOINT, tokens_count)
        asked = PrefillPrompt("r", 1, tuple(token_ids), len(token_ids), SamplingParameters(), "memory://")
        return PrefillRequest(asked, None, 0.0, pages or self.cache.pool.lease(pages_for(len(token_ids))))

    def run(self, *chunks: Chunk) -> torch.Tensor:
        return self.step.run(chunks, lambda *parcel: self.given.append(parcel))

    def chunked(self, request, borders) -> torch.Tensor:
        """Run one prompt in chunks that end at `borders`; its logits."""
        for begin, end in pairwise([request.tokens_done_count, *borders, len(request.asked.token_ids)]):
            logits = self.run(Chunk(request, begin, end))
        return logits

    def latents(self, request) -> torch.Tensor:
        """`[layers, tokens, latent_dim]` of a whole prompt, from its pages."""
        return self.cache.latents[:, slots_of(request.pages, 0, len(request.asked.token_ids))].clone()


@pytest.fixture(scope="module")
def alone(transformer):
    """Logits and latents of the prompt in one chunk, alone, in pages in a row."""
    bench = Bench(transformer)
    request = bench.begin(PROMPT)
    return bench.chunked(request, []), bench.latents(request)


def assert_same(bench, request, logits, alone):
    assert torch.equal(logits, alone[0]), "logits differ"
    assert torch.equal(bench.latents(request), alone[1]), "latents differ"


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("borders", [[], [64], [128, 320], [64, 128, 192, 256, 320], [320]])
def test_chunk_borders_and_micro_batches_change_no_bit(transformer, alone, borders, micro_batches):
    bench = Bench(transformer, micro_batches)
    request = bench.begin(PROMPT)
    assert_same(bench, request, bench.chunked(request, borders), alone)


@pytest.mark.parametrize("pages", [[5, 4, 3, 2, 1, 0], [1, 3, 5, 7, 9, 11]])
def test_scattered_pages_change_no_bit(transformer, alone, pages):
    bench = Bench(transformer)
    request = bench.begin(PROMPT, pages)
    assert_same(bench, request, bench.chunked(request, [192]), alone)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_company_changes_no_bit(transformer, alone, micro_batches):
    bench = Bench(transformer, micro_batches)
    before, request, after = bench.begin(100), bench.begin(PROMPT), bench.begin(3)
    bench.run(Chunk(request, 0, 128), Chunk(before, 0, 64))
    logits = bench.run(Chunk(before, 64, 100), Chunk(request, 128, PROMPT), Chunk(after, 0, 3))
    assert logits.shape[0] == 3
    assert_same(bench, request, logits[1:2], alone)


@pytest.mark.parametrize("cached_tokens", [64, 256, 320])
def test_a_cached_prefix_changes_no_bit(transformer, alone, cached_tokens):
    """Another prompt with the same beginning computed it, in other chunks and company."""
    bench = Bench(transformer, 2)
    token_ids = random_prompt(CHECKPOINT, PROMPT)
    other = bench.begin(0, token_ids=token_ids[:cached_tokens] + random_prompt(CHECKPOINT, 40))
    bench.run(Chunk(other, 0, 64), Chunk(bench.begin(90), 0, 90))
    other.tokens_done_count = 64
    bench.chunked(other, [])
    shared = other.pages[: cached_tokens // PAGE_TOKENS]
    request = bench.begin(0, shared + bench.cache.pool.lease(6 - len(shared)), token_ids)
    request.tokens_done_count = cached_tokens
    assert_same(bench, request, bench.chunked(request, []), alone)


def test_latents_are_given_away_in_order_as_they_stand_in_the_pages(transformer):
    bench = Bench(transformer, 2)
    requests = [bench.begin(PROMPT), bench.begin(150)]
    bench.run(*(Chunk(request, 0, len(request.asked.token_ids)) for request in requests))
    layers = transformer.config.layers_count
    for request in requests:
        own = [parcel for parcel in bench.given if parcel[0].request is request]
        for layer in range(layers):
            parts = [(chunk.begin, chunk.end, latents) for chunk, at, latents in own if at == layer]
            assert [begin for begin, _, _ in parts] == [0, *(end for _, end, _ in parts)][:-1]
            given = torch.cat([latents for _, _, latents in parts])
            assert torch.equal(given, bench.latents(request)[layer])
    written = torch.isfinite(bench.cache.latents).all(dim=-1).sum()
    assert written == layers * (PROMPT + 150), "a slot outside the prompts was written"


def test_what_others_hold_in_their_pages_is_never_read(transformer, alone):
    """The pages are poisoned with NaN, and so is a neighbour's."""
    bench = Bench(transformer)
    poisoned = bench.begin(100)
    request = bench.begin(PROMPT)
    logits = bench.chunked(request, [64])
    for run in page_runs(poisoned.pages, 0, 100):
        assert torch.isnan(bench.cache.latents[:, run]).all()
    assert_same(bench, request, logits, alone)


def test_no_logits_without_an_end(transformer):
    bench = Bench(transformer)
    assert bench.run(Chunk(bench.begin(PROMPT), 0, 64)).numel() == 0


@pytest.mark.parametrize("order", [1, -1])
def test_cached_latents_are_a_copy(transformer, order):
    bench = Bench(transformer)
    request = bench.begin(PROMPT)
    request.pages = request.pages[::order]
    bench.chunked(request, [])
    slots = bench.step.prefix_slots(request.pages, 128)
    copy = bench.step.cached_latents(slots, 1)
    assert torch.equal(copy, bench.latents(request)[1, :128])
    bench.cache.latents.fill_(0.0)
    assert copy.abs().sum() > 0


def spans(parts):
    return [[(chunk.begin, chunk.end) for chunk in part] for part in parts]


@pytest.mark.parametrize(
    ("lengths", "parts_count", "expected"),
    [
        ([512], 2, [[(0, 256)], [(256, 512)]]),
        ([512], 1, [[(0, 512)]]),
        ([200], 2, [[(0, 128)], [(128, 200)]]),
        ([128], 2, [[(0, 128)]]),
        ([300, 100], 2, [[(0, 256)], [(256, 300), (0, 100)]]),
        ([100, 300], 2, [[(0, 100), (0, 128)], [(128, 300)]]),
        ([100, 20, 300], 2, [[(0, 100), (0, 20), (0, 128)], [(128, 300)]]),
    ],
)
def test_chunks_are_split_in_halves_at_page_borders(lengths, parts_count, expected):
    requests = [
        PrefillRequest(PrefillPrompt("r", 1, tuple(range(n)), n, SamplingParameters(), ""), None, 0.0)
        for n in lengths
    ]
    chunks = [Chunk(request, 0, n) for request, n in zip(requests, lengths, strict=True)]
    parts = split_chunks(chunks, parts_count)
    assert spans(parts) == expected
    assert sum(chunk.tokens_count for part in parts for chunk in part) == sum(lengths)
