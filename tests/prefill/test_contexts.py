"""What chunks attend to at once is what they attend to one by one, whatever was cut where."""

from itertools import pairwise

import pytest
import torch

from kernels.model.latent_cache import LatentCache, as_index, slots_of
from kernels.model.pages import PAGE_TOKENS
from kernels.ops.backend import kernels_forced
from prefill.contexts import Span, contexts_of, grouped, spans_of
from prefill.messages import PrefillPrompt
from prefill.request import Chunk, PrefillRequest
from tests.fixtures import GREEDY

CPU = torch.device("cpu")
TOLERANCE = 2e-6  # of float32 attention, in other orders of summation


def drawn_chunk(pages: list[int], begin: int, end: int) -> Chunk:
    """Tokens of a prompt whose latents lie in `pages`."""
    asked = PrefillPrompt("r", 0, tuple(range(end)), end, GREEDY, "")
    return Chunk(PrefillRequest(asked, None, 0.0, pages), begin, end)


def test_chunks_are_cut_where_windows_begin():
    chunks = [drawn_chunk([0, 1, 2, 3], 64, 256), drawn_chunk([4], 0, 5)]
    assert [(span.begin, span.end) for span in spans_of(chunks, 128)] == [(64, 128), (128, 256), (0, 5)]


def test_first_windows_share_room_and_later_ones_do_not():
    spans = [Span([], 0, 50), Span([], 10, 60), Span([], 0, 30), Span([], 128, 140), Span([], 0, 5)]
    ends = [[span.end for span in group] for group in grouped(spans, 128)]
    assert ends == [[50, 60], [30], [140], [5]]


def test_windows_cover_every_context_once_and_rows_every_token():
    chunks = [drawn_chunk([3, 1, 2, 0], 100, 250), drawn_chunk([5], 0, 9), drawn_chunk([4], 0, 3)]
    contexts = contexts_of(chunks, CPU, 128)
    assert [(context.rows.start, context.rows.stop) for context in contexts] == [
        (0, 28),
        (28, 150),
        (150, 162),
    ]
    whole, own = contexts[1].windows
    assert not whole.is_causal and own.is_causal
    covered = torch.cat([whole.slots, own.slots])
    assert torch.equal(covered, as_index(slots_of([3, 1, 2, 0], 0, 250)))
    assert contexts[2].starts.tolist() == [0, 9, 12] and contexts[2].tokens_max == 9


@pytest.mark.parametrize("packs", [False, True], ids=["numbers", "FP8"])
def test_windows_attend_as_expand_does_however_chunks_are_cut(transformer, packs):
    layout = transformer.latent_layout(packs)
    attention = transformer.layers[0].attention
    cache = LatentCache(1, layout, 8 * PAGE_TOKENS * layout.row_bytes)
    fresh = torch.randn(8 * PAGE_TOKENS, layout.value_dim + layout.position_dim)
    rotation = transformer.rotation(torch.arange(len(fresh)))
    attention.store(fresh, rotation, cache.latents[0], torch.arange(len(fresh)))
    pages, end = [6, 2, 3], 150
    queries = torch.randn(end, transformer.config.heads_count, transformer.config.qk_head_dim)
    expected = attention.expand(queries, cache.read(0, slots_of(pages, 0, end)))
    results = []
    for cuts in ([0, end], [0, 64, 128, end]):
        chunks = [drawn_chunk(pages, *pair) for pair in pairwise(cuts)]
        with kernels_forced():
            mixed = [
                attention.expand_windows(
                    queries[chunk.begin : chunk.end], cache.latents[0], contexts_of([chunk], CPU, 128)
                )
                for chunk in chunks
            ]
            results.append(torch.cat(mixed))
    for result in results:
        assert (result - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_one_group_of_prompts_is_not_copied(transformer, monkeypatch):
    attention, part = transformer.layers[0].attention, torch.ones(9, 4)
    monkeypatch.setattr(type(attention), "_expand_some", lambda *_: part)
    contexts = contexts_of([drawn_chunk([5], 0, 9)], CPU, 128)
    assert attention.expand_windows(part, part, contexts) is part
    assert attention.expand_windows(part, part, contexts * 2).shape == (18, 4)
