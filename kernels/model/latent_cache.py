"""The latents a node holds: one allocation in pages, and where a request's tokens are in it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.model.pages import PAGE_TOKENS, PagePool, PagesExhausted
from kernels.ops.fp8_sizes import packed_bytes


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """How one token's latent of one layer lies in memory: as numbers, or packed as FP8 where it is bytes."""

    value_dim: int
    position_dim: int
    dtype: torch.dtype

    @property
    def is_packed(self) -> bool:
        """Whether a row is that of `kernels.ops.latent_format`."""
        return self.dtype == torch.uint8

    @property
    def row_size(self) -> int:
        """Numbers, or bytes, of one row."""
        dims = (self.value_dim, self.position_dim)
        return packed_bytes(*dims) if self.is_packed else sum(dims)

    @property
    def row_bytes(self) -> int:
        """Memory of one token and layer."""
        return self.row_size * self.dtype.itemsize


class LatentCache:
    """Pages of latents for all layers of one node: `[layers, pages, 64, row]`, one allocation."""

    def __init__(
        self,
        layers_count: int,
        layout: LatentLayout,
        budget_bytes: int,
        device: torch.device | str = "cpu",
    ):
        self.layers_count = layers_count
        self.layout = layout
        self.page_bytes = layers_count * PAGE_TOKENS * layout.row_bytes
        pages_count = budget_bytes // self.page_bytes
        if pages_count < 1:
            raise PagesExhausted(
                f"{budget_bytes} bytes hold no page of {self.page_bytes} bytes: raise latents_bytes"
            )
        self.pool = PagePool(pages_count)
        shape = (layers_count, pages_count * PAGE_TOKENS, layout.row_size)
        self.latents = torch.zeros(shape, dtype=layout.dtype, device=device)

    def pages_of(self, layer: int) -> torch.Tensor:
        """One layer's latents `[pages, 64, row]`, a view."""
        return self.latents[layer].unflatten(0, (-1, PAGE_TOKENS))

    def read(self, layer: int, slots: "slice | torch.Tensor") -> torch.Tensor:
        """Rows `[tokens, row]` of some slots of one layer; a view where they lie in a row."""
        return self.latents[layer][slots]


def slots_of(pages: Sequence[int], begin: int, end: int) -> "slice | torch.Tensor":
    """Slots of a request's tokens `begin..end`: a slice where its pages lie in a row, else an index int64."""
    if not pages or is_row(pages):
        first = (pages[0] if pages else 0) * PAGE_TOKENS
        return slice(first + begin, first + end)
    tokens = torch.arange(begin, end)
    return torch.tensor(pages)[tokens // PAGE_TOKENS] * PAGE_TOKENS + tokens % PAGE_TOKENS


def as_index(slots: "slice | torch.Tensor") -> torch.Tensor:
    """Slots as an index int64."""
    return torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots


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
