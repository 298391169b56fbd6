"""Lengths of prompts and outputs: lognormal, with one width below the median and another above it.

A plain lognormal has two parameters and so misses one of mean, p50 and p99; published lengths are lopsided.
Here p50 and p99 hold exactly, and the mean wherever lengths below the median can bring it about; where they
cannot, lengths are a plain lognormal of that p50 and p99, and `mean_of` says what their mean is.
"""

import math

import numpy

from cluster.bench.settings import LengthShape

Z_P99 = 2.3263478740408408  # the standard normal's 99th percentile
WIDTH_MIN = 0.05  # a narrower half would be no spread at all below the median
WIDTH_MAX = 4.0
BISECTIONS_COUNT = 50


def draw_lengths(
    shape: LengthShape, scale: float, count: int, generator: numpy.random.Generator
) -> numpy.ndarray:
    """Lengths in tokens `[count]`, int64, each at least 1."""
    below, above = widths(shape)
    normal = generator.standard_normal(count)
    spread = numpy.exp(normal * numpy.where(normal < 0, below, above))
    return numpy.maximum(1, numpy.rint(spread * shape.p50 * scale)).astype(numpy.int64)


def widths(shape: LengthShape) -> tuple[float, float]:
    """Standard deviations of the logarithm below and above the median that give the shape, or nearly so."""
    above = math.log(shape.p99 / shape.p50) / Z_P99
    wanted = shape.mean / shape.p50 - _mean_of_half(-above)
    low, high = WIDTH_MIN, WIDTH_MAX
    if not _mean_of_half(high) <= wanted <= _mean_of_half(low):
        return above, above
    for _ in range(BISECTIONS_COUNT):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_of_half(middle) > wanted else (low, middle)
    return low, above


def mean_of(shape: LengthShape) -> float:
    """The mean of lengths that are drawn for a shape, before rounding: the shape's own wherever it can be."""
    below, above = widths(shape)
    return shape.p50 * (_mean_of_half(below) + _mean_of_half(-above))


def _mean_of_half(width: float) -> float:
    """What one half of a lognormal of median 1 adds to the mean; a negative width is the upper half."""
    return math.exp(width**2 / 2) * math.erfc(width / math.sqrt(2)) / 2
