"""Loops that a CPU runs as machine code, where torch would need many small calls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kernels.ops.machine_code import ANY_ORDER, ONE_ROUNDING, machine_code

LOWEST, HIGHEST = np.float32(-87), np.float32(89)  # whose powers are the least normal number and infinity
LOG2_E = np.float32(1.44269504)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_TERMS = tuple(
    np.float32(term) for term in (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666667e-1, 0.5)
)


def compiled(
    signature: str | None = None, any_order: bool = False, makes_arrays: bool = False
) -> Callable[[Callable], Callable]:
    """Compile a function of arrays: at import for its signature, or into the functions that call it."""
    freedoms = ANY_ORDER if any_order else ONE_ROUNDING
    sources = [Path(__file__)]
    return lambda function: machine_code(function, signature, freedoms, sources, makes_arrays=makes_arrays)


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
    """`out = matrix @ row` for four rows and as much of the matrix as `out` has room for.

    Two numbers of each at a time: so many sums keep a core's multipliers busy. An odd last one goes alone.
    """
    first, second, third, fourth = rows
    whole = len(outs[0]) // 2 * 2
    for place in range(0, whole, 2):
        upper, lower = matrix[place], matrix[place + 1]
        first_sum = second_sum = third_sum = fourth_sum = np.float32(0)
        first_next = second_next = third_next = fourth_next = np.float32(0)
        for column in range(len(first)):
            number, following = upper[column], lower[column]
            first_sum += first[column] * number
            first_next += first[column] * following
            second_sum += second[column] * number
            second_next += second[column] * following
            third_sum += third[column] * number
            third_next += third[column] * following
            fourth_sum += fourth[column] * number
            fourth_next += fourth[column] * following
        outs[0][place], outs[0][place + 1] = first_sum, first_next
        outs[1][place], outs[1][place + 1] = second_sum, second_next
        outs[2][place], outs[2][place + 1] = third_sum, third_next
        outs[3][place], outs[3][place + 1] = fourth_sum, fourth_next
    for place in range(whole, len(outs[0])):
        last = matrix[place]
        first_sum = second_sum = third_sum = fourth_sum = np.float32(0)
        for column in range(len(first)):
            number = last[column]
            first_sum += first[column] * number
            second_sum += second[column] * number
            third_sum += third[column] * number
            fourth_sum += fourth[column] * number
        outs[0][place], outs[1][place] = first_sum, second_sum
        outs[2][place], outs[3][place] = third_sum, fourth_sum


@compiled()
def _four_from(numbers, place):
    return numbers[place], numbers[place + 1], numbers[place + 2], numbers[place + 3]


@compiled()
def _plus_products(total, by, numbers):
    """`total` and four products, one after the other."""
    total = total + by[0] * numbers[0]
    total = total + by[1] * numbers[1]
    total = total + by[2] * numbers[2]
    return total + by[3] * numbers[3]


@compiled()
def add_product(row, matrix, out):
    """`out += row @ matrix`, of which rows and columns beyond theirs are left: summed row after row."""
    whole = len(row) // 4 * 4
    for place in range(0, whole, 4):
        first, second, third, fourth = _four_from(matrix, place)
        by = _four_from(row, place)
        for column in range(len(out)):
            numbers = (first[column], second[column], third[column], fourth[column])
            out[column] = _plus_products(out[column], by, numbers)
    for place in range(whole, len(row)):
        for column in range(len(out)):
            out[column] = out[column] + row[place] * matrix[place, column]


@compiled()
def add_two_products(row, other_row, matrix, out, other_out):
    """`add_product` of two rows, with the same bits, for half the reading of the matrix."""
    whole = len(row) // 4 * 4
    for place in range(0, whole, 4):
        first, second, third, fourth = _four_from(matrix, place)
        by, by_other = _four_from(row, place), _four_from(other_row, place)
        for column in range(len(out)):
            numbers = (first[column], second[column], third[column], fourth[column])
            out[column] = _plus_products(out[column], by, numbers)
            other_out[column] = _plus_products(other_out[column], by_other, numbers)
    add_product(row[whole:], matrix[whole:], out)
    add_product(other_row[whole:], matrix[whole:], other_out)


@compiled()
def add_four_products(rows, matrix, outs):
    """`add_product` of four rows, with the same bits, for a quarter of the reading of the matrix."""
    out, other_out, third_out, fourth_out = outs
    whole = len(rows[0]) // 4 * 4
    for place in range(0, whole, 4):
        first, second, third, fourth = _four_from(matrix, place)
        by_first, by_second = _four_from(rows[0], place), _four_from(rows[1], place)
        by_third, by_fourth = _four_from(rows[2], place), _four_from(rows[3], place)
        for column in range(len(out)):
            numbers = (first[column], second[column], third[column], fourth[column])
            out[column] = _plus_products(out[column], by_first, numbers)
            other_out[column] = _plus_products(other_out[column], by_second, numbers)
            third_out[column] = _plus_products(third_out[column], by_third, numbers)
            fourth_out[column] = _plus_products(fourth_out[column], by_fourth, numbers)
    for index in range(4):
        add_product(rows[index][whole:], matrix[whole:], outs[index])


@compiled()
def exp_each(row):
    """`row = exp(row)`, a whole register at a time: within 2^-23 from -87 to 88, NaN stays NaN.

    2^k times a polynomial of what is left after k·ln 2, with the coefficients of Cephes' expf.
    """
    for place in range(len(row)):
        number = row[place]
        number = LOWEST if number < LOWEST else number
        number = HIGHEST if number > HIGHEST else number
        twos = np.floor(number * LOG2_E + np.float32(0.5))
        rest = number - twos * LN_2_HIGH - twos * LN_2_LOW
        value = EXP_TERMS[0]
        for term in EXP_TERMS[1:]:
            value = value * rest + term
        value = value * (rest * rest) + rest + np.float32(1)
        exponent = np.int32(twos if twos == twos else np.float32(0))  # no integer is NaN
        row[place] = value * np.int32((exponent + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled()
def greatest_of(row):
    """The greatest number of a row; where one is NaN, any."""
    greatest = row[0]
    for place in range(len(row)):
        greatest = row[place] if row[place] > greatest else greatest
    return greatest


@compiled(any_order=True)
def sum_of(row):
    """The sum of a row's numbers, whole registers of them at a time."""
    total = np.float32(0)
    for place in range(len(row)):
        total += row[place]
    return total
