"""Matrix products whose rows do not depend on how many rows share the call.

A request must get the same bits alone and among others. On CPU a product of fewer than four rows a thread
runs other code than a larger one, so small products are padded: a row then has one value, whatever the batch.
"""

import torch
from torch.nn import functional

ROWS_MIN = 4


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`hidden [rows, in] @ weight [out, in].T + bias`, each row with the same bits in any batch."""
    rows_count = hidden.shape[0]
    missing = rows_missing(rows_count, hidden.device)
    if not missing:
        return functional.linear(hidden, weight, bias)
    return functional.linear(functional.pad(hidden, (0, 0, 0, missing)), weight, bias)[:rows_count]


def linear_by_head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden [rows, heads, in]` by `weight [heads, in, out]`, `[rows, heads, out]`; rows as in `linear`."""
    rows_count = hidden.shape[0]
    missing = rows_missing(rows_count, hidden.device)
    if missing:
        hidden = functional.pad(hidden, (0, 0, 0, 0, 0, missing))
    return torch.bmm(hidden.transpose(0, 1), weight).transpose(0, 1)[:rows_count]


def rows_missing(rows_count: int, device: torch.device) -> int:
    """Rows to add before a product's rows are independent of their number."""
    if device.type != "cpu":
        return 0
    threads_count = torch.get_num_threads()
    if threads_count == 1:
        return max(ROWS_MIN - rows_count, 0)
    # several threads cut the rows among them, and each cut must hold whole groups of ROWS_MIN
    return -rows_count % (2 * ROWS_MIN * threads_count)
