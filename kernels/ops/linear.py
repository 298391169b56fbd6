"""Matrix products whose rows do not depend on how many rows share the call.

A request must get the same bits alone and among others, on whatever node it goes on. On CPU a product of very
few rows runs other code than a larger one, so small products are padded: a row then has one value, whatever
the batch. Weights that are used again and again are packed once, in the order in which oneDNN reads them
fastest. On a GPU a library would choose its algorithm by the number of rows: there own kernels multiply.
"""

import torch
from torch.nn import functional

from kernels.ops.backend import runs_kernel
from kernels.ops.compiled import (
    add_four_products,
    add_product,
    compiled,
    multiply_four,
    runs_compiled,
)
from kernels.ops.linear_kernel import linear_by_head_kernel, linear_kernel

ROWS_MIN = 4
PACKED_ROWS_MIN = 2


def packed(weight: torch.Tensor) -> torch.Tensor:
    """`weight [out, in]` as `linear` multiplies by it fastest: on CPU a copy in oneDNN's own order."""
    if weight.device.type != "cpu" or not packs(weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and multiplies numbers of this type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or bfloat16


def linear_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What `linear` computes, in torch, all of it in `dtype`."""
    if dtype not in (None, hidden.dtype):
        hidden, weight, bias = (part if part is None else part.to(dtype) for part in (hidden, weight, bias))
    rows_count = hidden.shape[0]
    missing = rows_missing(rows_count, weight)
    if missing:
        hidden = functional.pad(hidden, (0, 0, 0, missing))
    if weight.is_mkldnn:
        out = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    else:
        out = functional.linear(hidden, weight, bias)
    return out[:rows_count] if missing else out


def linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`hidden [rows, in] @ weight [out, in].T + bias`, each row with the same bits in any batch.

    In the type of `hidden`, or in a wider `dtype`: then nothing is rounded to that of `hidden` on the way.
    """
    if runs_kernel(hidden) and not weight.is_mkldnn:  # what is packed for a CPU, its library alone can read
        return linear_kernel(hidden, weight, bias, dtype)
    return linear_reference(hidden, weight, bias, dtype)


def linear_by_head_reference(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `linear_by_head` computes, in torch."""
    rows_count = hidden.shape[0]
    missing = rows_missing(rows_count, weight)
    if missing:
        hidden = functional.pad(hidden, (0, 0, 0, 0, 0, missing))
    return torch.bmm(hidden.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)[:rows_count]


def linear_by_head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden [rows, heads, in]` by `weight [heads, out, in]`, `[rows, heads, out]`; rows as in `linear`."""
    if hidden.shape[1:] != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"weights {list(weight.shape)} do not fit {list(hidden.shape)}")
    if runs_kernel(hidden):
        return linear_by_head_kernel(hidden, weight)
    if not runs_compiled(hidden):
        return linear_by_head_reference(hidden, weight)
    out = hidden.new_empty(*hidden.shape[:2], weight.shape[1])
    turned = weight.transpose(1, 2)
    if turned.is_contiguous():
        _add_by_head(hidden.contiguous().numpy(), turned.numpy(), out.numpy())
    else:
        _multiply_by_head(hidden.contiguous().numpy(), weight.contiguous().numpy(), out.numpy())
    return out


def packed_by_head(weight: torch.Tensor) -> torch.Tensor:
    """`weight [heads, out, in]` as `linear_by_head` multiplies by it fastest.

    Loops of a CPU add up whole rows of outputs where a head has few inputs, which then lie together.
    """
    is_wide = weight.shape[1] > weight.shape[2]
    if is_wide and not runs_kernel(weight) and weight.dtype == torch.float32:
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    return weight.contiguous()


@compiled("void(float32[:, :, ::1], float32[:, :, ::1], float32[:, :, ::1])")
def _multiply_by_head(hidden, weight, out):
    """Four rows at a time while a row of the weight is at hand."""
    last = hidden.shape[0] - 1
    for head in range(hidden.shape[1]):
        for row in range(0, last + 1, 4):
            # past the last row the last one is computed again
            second, third, fourth = min(row + 1, last), min(row + 2, last), min(row + 3, last)
            rows = (hidden[row, head], hidden[second, head], hidden[third, head], hidden[fourth, head])
            outs = (out[row, head], out[second, head], out[third, head], out[fourth, head])
            multiply_four(rows, weight[head], outs)


@compiled("void(float32[:, :, ::1], float32[:, :, ::1], float32[:, :, ::1])")
def _add_by_head(hidden, weight, out):
    """Weights `[heads, in, out]`, each row of which is read once for four of `hidden`."""
    out[:] = 0
    whole = len(hidden) // 4 * 4
    for head in range(hidden.shape[1]):
        for row in range(0, whole, 4):
            rows = (hidden[row, head], hidden[row + 1, head], hidden[row + 2, head], hidden[row + 3, head])
            outs = (out[row, head], out[row + 1, head], out[row + 2, head], out[row + 3, head])
            add_four_products(rows, weight[head], outs)
        for row in range(whole, len(hidden)):
            add_product(hidden[row, head], weight[head], out[row, head])


def rows_missing(rows_count: int, weight: torch.Tensor) -> int:
    """Rows to add before a product's rows are independent of their number."""
    if weight.device.type != "cpu" or rows_count == 0:
        return 0
    if weight.is_mkldnn:
        return max(PACKED_ROWS_MIN - rows_count, 0)
    threads_count = torch.get_num_threads()
    if threads_count == 1:
        return max(ROWS_MIN - rows_count, 0)
    # several threads cut the rows among them, and each cut must hold whole groups of ROWS_MIN
    return -rows_count % (2 * ROWS_MIN * threads_count)
