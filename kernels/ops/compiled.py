"""Loops that a CPU runs as machine code, where torch would need many small calls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kernels.ops.machine_code import ANY_ORDER, ONE_ROUNDING, machine_code


def compiled(signature: str | None = None, any_order: bool = False) -> Callable[[Callable], Callable]:
    """Compile a function of arrays: at import for its signature, or into the functions that call it."""
    freedoms = ANY_ORDER if any_order else ONE_ROUNDING
    return lambda function: machine_code(function, signature, freedoms, [Path(__file__)])


def runs_compiled(tensor: torch.Tensor) -> bool:
    """Whether compiled loops take this tensor: float32 in a CPU's memory, each row in one piece."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.stride(-1) == 1


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The memory from a tensor's first number to its last: loops over it are fast where rows lie apart."""
    if tensor.numel() == 0:
        return np.empty(0, np.float32)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy()


@compiled(any_order=True)
def multiply_four(rows, matrix, outs):
    """`out = matrix @ row` for four rows and as much of the matrix as `out` has room for."""
    first, second, third, fourth = rows
    for place in range(len(outs[0])):
        first_sum = second_sum = third_sum = fourth_sum = np.float32(0)
        for column in range(len(first)):
            number = matrix[place, column]
            first_sum += first[column] * number
            second_sum += second[column] * number
            third_sum += third[column] * number
            fourth_sum += fourth[column] * number
        outs[0][place], outs[1][place] = first_sum, second_sum
        outs[2][place], outs[3][place] = third_sum, fourth_sum


@compiled()
def add_product(row, matrix, out):
    """`out += row @ matrix`, of which rows and columns beyond theirs are left: summed row after row."""
    whole = len(row) // 4 * 4
    for place in range(0, whole, 4):
        by_first, by_second, by_third, by_fourth = row[place], row[place + 1], row[place + 2], row[place + 3]
        first, second, third, fourth = matrix[place], matrix[place + 1], matrix[place + 2], matrix[place + 3]
        for column in range(len(out)):
            total = out[column] + by_first * first[column]
            total = total + by_second * second[column]
            total = total + by_third * third[column]
            out[column] = total + by_fourth * fourth[column]
    for place in range(whole, len(row)):
        for column in range(len(out)):
            out[column] = out[column] + row[place] * matrix[place, column]


@compiled()
def add_two_products(row, other_row, matrix, out, other_out):
    """`add_product` of two rows, with the same bits, for half the reading of the matrix."""
    whole = len(row) // 4 * 4
    for place in range(0, whole, 4):
        first, second, third, fourth = matrix[place], matrix[place + 1], matrix[place + 2], matrix[place + 3]
        by_first, by_second, by_third, by_fourth = row[place], row[place + 1], row[place + 2], row[place + 3]
        of_first, of_second = other_row[place], other_row[place + 1]
        of_third, of_fourth = other_row[place + 2], other_row[place + 3]
        for column in range(len(out)):
            total = out[column] + by_first * first[column]
            other = other_out[column] + of_first * first[column]
            total = total + by_second * second[column]
            other = other + of_second * second[column]
            total = total + by_third * third[column]
            other = other + of_third * third[column]
            out[column] = total + by_fourth * fourth[column]
            other_out[column] = other + of_fourth * fourth[column]
    add_product(row[whole:], matrix[whole:], out)
    add_product(other_row[whole:], matrix[whole:], other_out)
