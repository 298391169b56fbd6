"""A plan keeps its rate, its unevenness, its bursts, its share of prefixes and the model's context."""

from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as some

from cluster.bench.load import Arrivals, arrival_times, draw_prefixes, plan_load
from cluster.bench.settings import LengthShape, LoadSettings
from cluster.bench.workload import ModelLimits, prompt_tokens
from cluster.errors import InvalidRequest

MODEL = ModelLimits(vocab_size=1000, context_tokens_max=512)
LARGE = ModelLimits(vocab_size=129_280, context_tokens_max=163_840)


@pytest.mark.parametrize("gap_cv", [0.1, 1.0, 1.1, 3.0])
def test_arrivals_have_rate_and_unevenness(gap_cv):
    times_s = arrival_times(Arrivals(100.0, 500.0, gap_cv), numpy.random.default_rng(2))
    gaps_s = numpy.diff(times_s)
    assert len(times_s) == 50_000
    assert gaps_s.mean() == pytest.approx(0.01, rel=0.02)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(gap_cv, rel=0.08)


def test_very_uneven_arrivals_peak_as_those_of_code():
    times_s = arrival_times(Arrivals(20.0, 1000.0, 13.0), numpy.random.default_rng(3))
    in_seconds = numpy.histogram(times_s, numpy.arange(1001))[0]
    assert 10 < in_seconds.max() / in_seconds.mean() < 60


def test_bursts_leave_the_rest_of_each_period_empty():
    times_s = arrival_times(Arrivals(50.0, 40.0, 1.0, 4.0, 10.0), numpy.random.default_rng(4))
    assert len(times_s) == 2000
    assert (times_s % 10.0).max() <= 2.5
    assert all(350 < count < 650 for count in numpy.histogram(times_s, [0, 10, 20, 30, 40])[0])


@given(
    some.floats(0.01, 50.0),
    some.floats(0.1, 20.0),
    some.floats(0.01, 30.0),
    some.floats(1.0, 100.0),
    some.floats(0.1, 30.0),
    some.integers(0, 2**32),
)
def test_arrivals_ascend_within_the_duration(rate, duration_s, gap_cv, burst, period_s, seed):
    arrivals = Arrivals(rate, duration_s, gap_cv, burst, period_s)
    times_s = arrival_times(arrivals, numpy.random.default_rng(seed))
    assert len(times_s) == max(1, round(rate * duration_s))
    assert (numpy.diff(times_s) >= 0).all()
    assert times_s[0] >= 0 and times_s[-1] <= duration_s


@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_prefixes_take_their_share_of_prompt_tokens(share):
    tokens = numpy.random.default_rng(5).integers(1000, 5000, 5000).tolist()
    prefixes = draw_prefixes(tokens, share, 8, numpy.random.default_rng(6))
    shared = sum(len(prefix) * 8 for prefix in prefixes)
    assert shared / sum(tokens) == pytest.approx(share, rel=0.02)


def test_prefixes_form_a_tree_and_are_found_again():
    prefixes = draw_prefixes([800] * 2000, 0.4, 8, numpy.random.default_rng(7))
    parents = {}
    for prefix in prefixes:
        for parent, child in zip((None, *prefix), prefix, strict=False):
            assert parents.setdefault(child, parent) == parent
    roots = [child for child, parent in parents.items() if parent is None]
    leaves = {prefix[20] for prefix in prefixes}
    assert len(roots) == 1
    assert len(leaves) == 64
    by_leaf = sorted((sum(prefix[20] == leaf for prefix in prefixes) for leaf in leaves), reverse=True)
    assert by_leaf[0] > 10 * by_leaf[-1]


def test_equal_prefixes_are_equal_tokens_and_the_rest_is_not():
    settings = LoadSettings(prompt=LengthShape(6400, 6400, 6400), prefix_share=0.5, rate_per_s=10.0)
    workload = plan_load(settings, MODEL)
    prompts = [prompt_tokens(workload, index, MODEL.vocab_size) for index in range(40)]
    for index, (request, prompt) in enumerate(zip(workload.requests[:40], prompts, strict=True)):
        assert len(prompt) == request.prompt_tokens_count
        assert all(0 <= token < MODEL.vocab_size for token in prompt)
        for other, before in zip(workload.requests[:index], prompts, strict=False):
            pairs = zip(request.shared_blocks, other.shared_blocks, strict=False)
            same_count = 8 * sum(a == b for a, b in pairs)
            assert prompt[:same_count] == before[:same_count]
            assert prompt[same_count : same_count + 16] != before[same_count : same_count + 16]


@pytest.mark.parametrize("profile", ["azure-code", "azure-conversation", "mooncake-conversation"])
def test_plans_fit_the_context_and_are_repeatable(profile):
    settings = LoadSettings(profile=profile, rate_per_s=20.0, priorities=(-10, 10))
    workload = plan_load(settings, MODEL)
    assert len(workload.requests) == 600
    assert workload.block_tokens == 8
    for request in workload.requests:
        assert request.prompt_tokens_count + request.output_tokens_count <= MODEL.context_tokens_max
        assert request.output_tokens_count >= 1
    assert {request.priority for request in workload.requests} == {-10, 10}
    assert plan_load(settings, MODEL) == workload
    other = plan_load(replace(settings, seed=1), MODEL)
    assert other != workload
    assert prompt_tokens(other, 0, 1000)[:4] != prompt_tokens(workload, 0, 1000)[:4]


def test_what_does_not_fit_is_cut_and_counted():
    settings = LoadSettings(profile="mooncake-conversation", scale=1.0, rate_per_s=20.0)
    assert plan_load(settings, LARGE).cut_count < 10
    assert plan_load(settings, MODEL).cut_count > 580


def notes_of(**settings) -> str:
    """What is told of a plan."""
    return " ".join(plan_load(LoadSettings(rate_per_s=20.0, **settings), MODEL).notes)


def test_what_cannot_be_as_asked_is_told():
    assert "outputs have a mean of 161 tokens before scaling and not of 211" in notes_of()
    assert "% of outputs are a single token" in notes_of(profile="azure-code")
    assert notes_of(profile="mooncake-conversation", scale=1 / 16) == ""
    assert notes_of(output=LengthShape(100, 100, 100), scale=1 / 16) == ""
    assert notes_of(output=LengthShape(20, 1000, 2000)).startswith("outputs have a mean of")


def test_too_much_is_refused():
    with pytest.raises(InvalidRequest, match="--rate"):
        plan_load(LoadSettings(rate_per_s=1e5, duration_s=3600.0), MODEL)
    with pytest.raises(InvalidRequest, match="tokens of output"):
        settings = LoadSettings(output=LengthShape(1e5, 1e5, 1e5), rate_per_s=100.0, scale=1.0)
        plan_load(settings, LARGE)
