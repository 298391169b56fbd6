"""Lengths hit the percentiles that they are asked for, and the mean where they can."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as some

from cluster.bench.lengths import draw_lengths, mean_of, widths
from cluster.bench.settings import PROFILES, LengthShape

COUNT = 200_000
SHAPES = [shape for profile in PROFILES.values() for shape in (profile.prompt, profile.output)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_profiles_have_the_shape_that_was_published(shape):
    lengths = draw_lengths(shape, 1.0, COUNT, numpy.random.default_rng(1))
    p50, p99 = numpy.percentile(lengths, [50, 99])
    assert p50 == pytest.approx(shape.p50, rel=0.03, abs=0.6)
    assert p99 == pytest.approx(shape.p99, rel=0.05)
    assert lengths.mean() == pytest.approx(mean_of(shape), rel=0.02, abs=0.5)
    # One output's published mean lies above what any lognormal of its percentiles can have.
    assert mean_of(shape) == pytest.approx(160.6 if shape.mean == 211 else shape.mean, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_are_short_lengths_too(shape):
    lengths = draw_lengths(shape, 1.0, COUNT, numpy.random.default_rng(1))
    assert numpy.percentile(lengths, 1) < 0.7 * shape.p50


def test_a_plain_lognormal_is_found_again():
    width = 0.8
    shape = LengthShape(mean=1000 * numpy.exp(width**2 / 2), p50=1000, p99=1000 * numpy.exp(2.32635 * width))
    assert widths(shape) == pytest.approx((width, width), rel=1e-3)


def test_one_number_alone_is_one_length():
    lengths = draw_lengths(LengthShape(640, 640, 640), 1 / 64, 1000, numpy.random.default_rng(1))
    assert set(lengths.tolist()) == {10}


@given(
    some.floats(0.1, 1e5),
    some.floats(1.0, 30.0),
    some.floats(0.1, 20.0),
    some.floats(1e-3, 2.0),
    some.integers(0, 2**32),
)
def test_lengths_are_whole_and_at_least_one(p50, p99_over_p50, mean_over_p50, scale, seed):
    shape = LengthShape(p50 * mean_over_p50, p50, p50 * p99_over_p50)
    lengths = draw_lengths(shape, scale, 50, numpy.random.default_rng(seed))
    assert lengths.dtype == numpy.int64
    assert lengths.min() >= 1
