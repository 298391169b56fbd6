"""Absorbed attention's kernel against its reference in float64; what no request may read is poisoned."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch

from kernels.ops import mla_decode_kernel as product
from kernels.ops.backend import IS_INTERPRETED, kernels_forced
from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.latent_format import pack_latents_reference, unpack_latents_reference
from kernels.ops.mla_decode import mla_decode, mla_decode_reference
from kernels.ops.mla_decode_kernel import mla_decode_kernel
from kernels.ops.split_context import INVARIANT_SPLITS_MAX, SplitPlan

VALUE, POSITION = 64, 16
SCALE = 0.2
PAGE_TOKENS = 64
NOWHERE = 2**30  # a page that no pool has

# Of float32, by device: a GPU approximates exponentials (ex2.approx: 2 ulps), and adds in its own order.
FLOAT32_TOLERANCE = {"cpu": 4e-6, "cuda": 1.6e-5}
BFLOAT16_ROUNDING = 2**-7  # of a number: twice what its 8 bits lose
BFLOAT16_TOLERANCE = 4e-3  # beside that: weights are rounded too before they multiply
RAGGED = [1, 200, 63, 0, 64, 65]


class Requests(NamedTuple):
    """The first arguments of `mla_decode`."""

    queries: torch.Tensor
    latents: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor

    def only(self, some: list[int]) -> "Requests":
        """Some of them, over the same latents."""
        newest_count = len(self.queries) // len(self.lengths)
        queries = self.queries.unflatten(0, (-1, newest_count))[some].flatten(0, 1)
        return Requests(queries, self.latents, self.pages[some], self.lengths[some])


def drawn(
    lengths: list[int],
    heads_count: int,
    newest_count: int = 1,
    dtype: torch.dtype = torch.float32,
    is_packed: bool = False,
    dims: tuple[int, int] = (VALUE, POSITION),
) -> Requests:
    """Requests in pages out of order; NaN (bytes of 255) where none has written, pages that are not there."""
    used = [-(-length // PAGE_TOKENS) for length in lengths]
    order = torch.randperm(sum(used) + 2).tolist()
    row_size = packed_bytes(*dims) if is_packed else sum(dims)
    shape = (len(order), PAGE_TOKENS, row_size)
    latents = torch.full(shape, 255 if is_packed else float("nan"), dtype=torch.uint8 if is_packed else dtype)
    pages = torch.full((len(lengths), max(used) + 2), NOWHERE, dtype=torch.int32)
    for request, length in enumerate(lengths):
        for page in range(used[request]):
            pages[request, page] = order.pop()
            rows = torch.randn(min(PAGE_TOKENS, length - page * PAGE_TOKENS), sum(dims))
            rows = pack_latents_reference(rows, dims[0]) if is_packed else rows.to(dtype)
            latents[pages[request, page], : len(rows)] = rows
    queries = torch.randn(len(lengths) * newest_count, heads_count, sum(dims)).to(dtype)
    return Requests(queries, latents, pages, torch.tensor(lengths, dtype=torch.int32))


def expected_of(requests: Requests, value_dim: int = VALUE) -> torch.Tensor:
    """Attention in float64 over the numbers that latents stand for."""
    latents = requests.latents
    if latents.dtype == torch.uint8:
        latents = unpack_latents_reference(latents.flatten(0, 1), value_dim).unflatten(0, (-1, PAGE_TOKENS))
    wide = requests._replace(queries=requests.queries.double(), latents=latents.double())
    return mla_decode_reference(*wide, value_dim, SCALE)


def attended(requests: Requests, device: torch.device, value_dim: int = VALUE, **options) -> torch.Tensor:
    """What the kernel makes of them, on the device."""
    return mla_decode_kernel(*(part.to(device) for part in requests), value_dim, SCALE, **options)


def forced(device: torch.device) -> AbstractContextManager[None]:
    """The kernels' path, also without a GPU."""
    return nullcontext() if device.type == "cuda" else kernels_forced()


def unspecialised(kernel: object) -> set[str]:
    """Parameters on whose values no variant of a kernel depends, compiled or interpreted."""
    options = kernel.kwargs if IS_INTERPRETED else vars(kernel)
    return set(options["do_not_specialize"])


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the tolerance of the result's type."""
    assert result.shape == expected.shape
    error = (result.cpu().double() - expected).abs()
    if result.dtype == torch.bfloat16:
        allowed = expected.abs() * BFLOAT16_ROUNDING + BFLOAT16_TOLERANCE
    else:
        allowed = torch.full_like(error, FLOAT32_TOLERANCE[result.device.type])
    assert (error <= allowed).all(), (error - allowed).max()


@pytest.mark.parametrize(
    ("heads_count", "newest_count"), [(1, 1), (5, 1), (5, 3), (16, 1), (16, 2), (16, 4), (40, 1), (35, 2)]
)
def test_any_rows_are_the_reference_and_what_is_unused_is_never_read(heads_count, newest_count, device):
    requests = drawn(RAGGED, heads_count, newest_count)
    assert_close(attended(requests, device), expected_of(requests))


@pytest.mark.parametrize("is_packed", [False, True], ids=["bfloat16", "FP8"])
@pytest.mark.parametrize(("heads_count", "newest_count"), [(3, 2), (24, 1)])
def test_narrow_latents_lose_no_more_than_they_must(heads_count, newest_count, is_packed, device):
    requests = drawn(RAGGED, heads_count, newest_count, torch.bfloat16, is_packed)
    result = attended(requests, device)
    assert result.dtype == torch.bfloat16
    assert_close(result, expected_of(requests))


def test_packed_latents_are_read_to_the_bit(device):
    """In float32 nothing but the order of sums differs from the numbers that codes and scales stand for."""
    requests = drawn([130], 4, is_packed=True, dims=(256, POSITION))
    requests.latents[requests.pages[0, 0], :, 128:256] = 0x7E  # 448, under scales of their own
    assert_close(attended(requests, device, 256), expected_of(requests, 256))


@pytest.mark.parametrize("dims", [(32, 8), (40, 24)], ids=str)
@pytest.mark.parametrize("is_packed", [False, True], ids=["float32", "FP8"])
def test_dimensions_need_not_be_powers_of_two(dims, is_packed, device):
    requests = drawn([70], 3, is_packed=is_packed, dims=dims)
    assert_close(attended(requests, device, dims[0]), expected_of(requests, dims[0]))


@pytest.mark.parametrize("is_packed", [False, True], ids=["bfloat16", "FP8"])
def test_the_dimensions_of_the_real_model(is_packed, device):
    requests = drawn([70], 16, dtype=torch.bfloat16, is_packed=is_packed, dims=(512, 64))
    assert_close(attended(requests, device, 512), expected_of(requests, 512))


def test_contexts_of_several_splits_are_merged(device):
    requests = drawn([2 * 1024 + 70, 1024, 30, 1025], 3, 2)
    assert_close(attended(requests, device), expected_of(requests))


@pytest.mark.parametrize("splits_count", [2, 4, 12])
def test_splits_grow_where_there_are_too_few(splits_count, device, monkeypatch):
    monkeypatch.setattr(product, "invariant_split_plan", lambda tokens: SplitPlan(64, splits_count))
    requests = drawn([600, 1, 0, 256, 257], 2, 4)
    assert_close(attended(requests, device), expected_of(requests))


def test_the_soonest_splits_give_the_same_numbers(device):
    requests = drawn([700, 300, 0, 5], 2)
    assert_close(attended(requests, device, batch_invariant=False), expected_of(requests))


class Grids(list):
    """A kernel that only notes how it is launched."""

    def __getitem__(self, grid):
        self.append(grid)
        return lambda *_, **__: None


@pytest.mark.parametrize(
    ("heads_count", "is_packed", "splits_count"),
    [(16, False, 8), (16, True, 4), (128, False, 2), (128, True, 2)],
    ids=["few rows, two programs a processor", "few rows in FP8", "many rows", "many rows in FP8"],
)
def test_the_soonest_splits_fill_as_many_programs_as_run(heads_count, is_packed, splits_count, monkeypatch):
    grids = Grids()
    monkeypatch.setattr(product, "_attend_split", grids)
    monkeypatch.setattr(product, "_merge_splits", Grids())
    requests_count, pages_count = 33, 128
    queries = torch.empty(requests_count, heads_count, VALUE + POSITION, dtype=torch.bfloat16, device="meta")
    row_size, dtype = (packed_bytes(VALUE, POSITION), torch.uint8) if is_packed else (80, torch.bfloat16)
    latents = torch.empty(1, PAGE_TOKENS, row_size, dtype=dtype, device="meta")
    pages = torch.empty(requests_count, pages_count, dtype=torch.int32, device="meta")
    for batch_invariant in (False, True):
        mla_decode_kernel(queries, latents, pages, pages[:, 0], VALUE, SCALE, batch_invariant)
    tiles_count = 1 if heads_count == 16 else 2
    assert grids == [(tiles_count, requests_count, splits_count), (tiles_count, requests_count, 8)]


@pytest.mark.parametrize("is_packed", [False, True], ids=["bfloat16", "FP8"])
@pytest.mark.parametrize("newest_count", [1, 3])
def test_a_request_has_the_same_bits_alone_and_in_company(newest_count, is_packed, device):
    """Also where the company's page table has room for several splits, and its own for one."""
    requests = drawn([200, 1, 1100, 64], 2, newest_count, torch.bfloat16, is_packed)
    together = attended(requests, device).unflatten(0, (-1, newest_count))
    for request, used in enumerate([4, 1, 18, 1]):
        alone = requests.only([request])
        narrow = alone._replace(pages=alone.pages[:, :used])
        assert torch.equal(attended(narrow, device), together[request])
    assert torch.equal(attended(requests.only([3, 2]), device), together[[3, 2]].flatten(0, 1))


def test_a_request_that_is_no_number_spoils_only_itself(device):
    requests = drawn([90, 40], 2)
    before = attended(requests, device)
    requests.latents[requests.pages[0, 1], 3] = float("nan")
    after = attended(requests, device)
    assert after[0].isnan().all() and torch.equal(after[1], before[1])


def test_queries_may_be_part_of_a_wider_tensor(device):
    requests = drawn([70, 3], 3)
    wide = torch.full((2, 5, VALUE + POSITION + 7), float("nan"))
    part = wide[:, 1:4, : VALUE + POSITION]
    part.copy_(requests.queries)
    assert_close(attended(requests._replace(queries=part), device), expected_of(requests))


def test_no_requests_have_no_outputs(device):
    requests = drawn([5], 3).only([])
    assert attended(requests, device).shape == (0, 3, VALUE)


@pytest.mark.parametrize("is_packed", [False, True], ids=["float32", "FP8"])
def test_the_operation_belongs_to_its_kernel(is_packed, device):
    requests = drawn([70, 3], 3, 2, is_packed=is_packed)
    with forced(device):
        result = mla_decode(*(part.to(device) for part in requests), VALUE, SCALE)
    assert torch.equal(result, attended(requests, device))


@pytest.mark.parametrize("is_packed", [False, True], ids=["float32", "FP8"])
def test_on_a_cpu_newest_tokens_see_what_one_by_one_they_would(is_packed):
    lengths = [200, 2, 1, 0]
    requests = drawn(lengths, 3, 3, is_packed=is_packed)
    requests.pages[requests.pages == NOWHERE] = 0  # which compiled loops refuse
    result = mla_decode(*requests, VALUE, SCALE).unflatten(0, (-1, 3))
    for newest in range(3):
        shorter = (requests.lengths - (2 - newest)).clamp_min(0)
        queries = requests.queries.unflatten(0, (-1, 3))[:, newest]
        single = mla_decode(queries, requests.latents, requests.pages, shorter, VALUE, SCALE)
        assert torch.allclose(result[:, newest], single, atol=FLOAT32_TOLERANCE["cpu"])
    assert (result[3] == 0).all() and (result[1, 0] == 0).all()


def test_what_follows_the_longest_context_compiles_nothing_anew():
    for kernel in (product._attend_split, product._merge_splits):
        assert {"splits_count", "unit_tokens"} <= unspecialised(kernel)
    assert {"pages", "pages_stride", "lengths"} <= unspecialised(product._attend_split)


@pytest.mark.parametrize("pages_count", [17, 100, 512])
def test_the_invariant_plan_merges_in_one_width(pages_count, device, monkeypatch):
    widths = []
    monkeypatch.setattr(product, "_attend_split", {(1, 1, -(-pages_count // 16)): lambda *_, **__: None})
    monkeypatch.setattr(product, "_merge_splits", {(3, 1): lambda *arguments: widths.append(arguments[-2])})
    requests = drawn([5], 3)
    attended(requests._replace(pages=requests.pages[:, :1].expand(1, pages_count)), device)
    assert widths == [INVARIANT_SPLITS_MAX]


@pytest.mark.parametrize(
    "broken",
    [
        lambda requests: requests._replace(queries=requests.queries[:3]),
        lambda requests: requests._replace(pages=requests.pages[:1]),
        lambda requests: requests._replace(latents=requests.latents[..., 1:]),
        lambda requests: requests._replace(latents=requests.latents.to(torch.uint8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(broken):
    with pytest.raises(ValueError):
        mla_decode(*broken(drawn([70, 3], 3, 2)), VALUE, SCALE)
