"""What every operation on rows must hold on a CPU: a row has the same bits alone and in any company."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

ROWS_COUNT = 130
SIZES = (*range(1, 41), 64, 97, 129)
SIZES_OF_THREADS = (*range(1, 6), 8, 9, 15, 16, 17, 24, 33, 40, 64, 97, 129)  # threads are slow on busy cores
THREADS = (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_rows_keep_their_bits(
    compute: Callable[[slice], torch.Tensor], rows_count: int = ROWS_COUNT
) -> None:
    """`compute` gives the results of some rows; each must be what it is among all, wherever it stands."""
    every = slice(0, rows_count)
    whole = compute(every)
    assert not whole.isnan().any()
    one_thread = torch.get_num_threads() == 1
    sizes = SIZES if one_thread else SIZES_OF_THREADS
    for size in (size for size in sizes if size < rows_count):
        for begin in {0, 1, 3, rows_count - size} if one_thread else {0, 3}:
            some = slice(begin, min(begin + size, rows_count))
            assert torch.equal(compute(some), whole[some]), f"{some} of {every}"
