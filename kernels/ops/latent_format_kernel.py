"""Latents as FP8 in kernels: numbers to codes and scales, by the very arithmetic of the reference."""

from kernels.ops.backend import tl, triton
from kernels.ops.narrow import to_e4m3

TILE = tl.constexpr(128)
GREATEST_BITS_MIN = tl.constexpr(((127 - 92) << 23) | 0x600000)  # 448 x 2^-100: less has the scale 2^-100
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def scaled_to_e4m3(numbers):
    """`numbers [rows, 128]` float32 to their codes, bytes, and `[rows]` scales, float32 powers of two.

    The scale of a row is the least of which 448 times is not below the row's greatest number: found on bits,
    where dividing by 448 would round as the chip likes. What is not finite has NaN as scale.
    """
    greatest = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    bounded = tl.maximum(greatest, GREATEST_BITS_MIN)
    bits = ((bounded + 0x1FFFFF) & -0x800000) - (8 << 23)  # 448 is 1.75 x 2^8; 0.75 is 0x600000
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    scales = tl.where(greatest < INFINITY_BITS, bits, NAN_BITS).to(tl.float32, bitcast=True)
    return to_e4m3(numbers * inverse[:, None]).to(tl.uint8, bitcast=True), scales
