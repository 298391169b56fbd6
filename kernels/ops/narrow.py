"""Arithmetic that kernels share, right in Triton's interpreter too: narrow numbers and products of them.

The interpreter truncates where a GPU rounds to the nearest even, and adds bfloat16 numbers as if they were
integers. Kernels therefore convert and multiply through these functions alone; on a GPU each is one
instruction. Formats: OCP FP8 E4M3 (1.0, 2023), bfloat16.
"""

from kernels.ops.backend import INTERPRETED, tl, triton

E4M3_MAX = tl.constexpr(448.0)
E4M3_NAN = tl.constexpr(0x7F)


@triton.jit
def to_bfloat16(numbers):
    """float32 to bfloat16, rounded to the nearest even; NaN stays."""
    if INTERPRETED:
        bits = numbers.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        numbers = tl.where(numbers == numbers, rounded.to(tl.float32, bitcast=True), numbers)
    return numbers.to(tl.bfloat16)


@triton.jit
def to_e4m3(numbers):
    """float32 to FP8 E4M3, rounded to the nearest even; beyond ±448 it is ±448; NaN stays."""
    numbers = tl.clamp(numbers, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:
        bits = numbers.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
        subnormal = (numbers + 24576.0) - 24576.0  # float32 near 24,576 has steps of 2^-9, as these have
        sign = bits & -2147483648  # which a sum of zero has lost
        subnormal = (subnormal.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(numbers) < 0.015625, subnormal, normal)
        codes = tl.where(numbers == numbers, rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True), E4M3_NAN)
        return codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return numbers.to(tl.float8e4nv)


@triton.jit
def to_dtype(numbers, dtype: tl.constexpr):
    """float32 to float32, bfloat16 or FP8 E4M3."""
    if dtype == tl.bfloat16:
        return to_bfloat16(numbers)
    elif dtype == tl.float8e4nv:
        return to_e4m3(numbers)
    else:
        return numbers.to(dtype)


@triton.jit
def dot(left, right, total):
    """`total + left @ right` with float32 sums, of bfloat16, FP8 or float32 tiles."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    else:
        return tl.dot(left, right, total, input_precision="ieee")
