"""The latents a node holds: one allocation in pages, and where a request's tokens are in it."""

import itertools
from collections.abc import Sequence

import torch

from kernels.model.pages import PAGE_TOKENS, PagePool, PagesExhausted


class LatentCache:
    """Pages of latents for all layers of one node: `[layers, pages, 64, latent_dim]`, one allocation."""

    def __init__(self, layers_count: int, latent_dim: int, dtype: torch.dtype, budget_bytes: int):
        self.layers_count = layers_count
        self.page_bytes = layers_count * PAGE_TOKENS * latent_dim * dtype.itemsize
        pages_count = budget_bytes // self.page_bytes
        if pages_count < 1:
            raise PagesExhausted(
                f"{budget_bytes} bytes hold no page of {self.page_bytes} bytes: raise latents_bytes"
            )
        self.pool = PagePool(pages_count)
        self.latents = torch.zeros(layers_count, pages_count * PAGE_TOKENS, latent_dim, dtype=dtype)

    def pages_of(self, layer: int) -> torch.Tensor:
        """One layer's latents `[pages, 64, latent_dim]`, a view."""
        return self.latents[layer].unflatten(0, (-1, PAGE_TOKENS))

    def write(self, layer: int, slots: torch.Tensor, latents: torch.Tensor) -> None:
        """Put `latents [tokens, latent_dim]` into `slots [tokens]` of one layer."""
        self.latents[layer].index_copy_(0, slots, latents)

    def read(self, layer: int, slots: "slice | torch.Tensor") -> torch.Tensor:
        """Latents `[tokens, latent_dim]` of some slots of one layer; a view where they lie in a row."""
        return self.latents[layer][slots]


def slots_of(pages: Sequence[int], begin: int, end: int) -> "slice | torch.Tensor":
    """Slots of a request's tokens `begin..end`: a slice where its pages lie in a row, else an index int64."""
    if not pages or is_row(pages):
        first = (pages[0] if pages else 0) * PAGE_TOKENS
        return slice(first + begin, first + end)
    tokens = torch.arange(begin, end)
    return torch.tensor(pages)[tokens // PAGE_TOKENS] * PAGE_TOKENS + tokens % PAGE_TOKENS


def is_row(pages: Sequence[int]) -> bool:
    """Whether pages are neighbours in ascending order."""
    return all(after == before + 1 for before, after in itertools.pairwise(pages))


def page_runs(pages: Sequence[int], begin: int, end: int) -> list[slice]:
    """The slots of tokens `begin..end` as slices, as few as their pages allow."""
    runs: list[slice] = []
    for token in range(begin - begin % PAGE_TOKENS, end, PAGE_TOKENS):
        first = pages[token // PAGE_TOKENS] * PAGE_TOKENS
        run = slice(first + max(begin - token, 0), first + min(end - token, PAGE_TOKENS))
        if runs and runs[-1].stop == run.start:
            runs[-1] = slice(runs[-1].start, run.stop)
        else:
            runs.append(run)
    return runs
