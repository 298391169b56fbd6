"""Plan a load like a profile's: lognormal lengths, Gamma arrivals in bursts, prompts from a tree of prefixes.

Pure: the same settings, model and seed give the same plan, whatever the cluster is like.
"""

from dataclasses import dataclass

import numpy

from cluster.bench.lengths import draw_lengths, mean_of
from cluster.bench.settings import PROFILES, REQUESTS_COUNT_MAX, LengthShape, LoadSettings, refused
from cluster.bench.workload import (
    ModelLimits,
    PlannedRequest,
    Workload,
    check_sizes,
    fit_lengths,
    notes_of_single_tokens,
    scaled_block_tokens,
)

DURATION_S = 30.0
FORKS_COUNT = 6  # the tree forks in two at each of its first blocks: 64 prefixes that begin alike
POPULARITY = 3.0  # how uneven: at 3 the first prefix has a quarter of all requests, the last 1 in 190
SEED_END = 2**63
MEAN_MISS_MAX = 0.01


@dataclass(frozen=True)
class Arrivals:
    """When requests come: gaps of a coefficient of variation, all in the first 1 / burst of each period."""

    rate_per_s: float
    duration_s: float
    gap_cv: float
    burst_factor: float = 1.0
    burst_period_s: float = 10.0


def plan_load(settings: LoadSettings, model: ModelLimits) -> Workload:
    """Requests for a model; raises InvalidRequest for too many."""
    generator = numpy.random.default_rng(settings.seed)
    times_s = arrival_times(arrivals_of(settings), generator)
    count = len(times_s)
    drawn = draw_pairs(settings, count, generator)
    fitted = [fit_lengths(*pair, model.context_tokens_max) for pair in drawn]
    block_tokens = scaled_block_tokens(settings.scale)
    prompts = [prompt for prompt, _ in fitted]
    prefixes = draw_prefixes(prompts, prefix_share_of(settings), block_tokens, generator)
    seeds = generator.integers(0, SEED_END, count).tolist()
    priorities = generator.choice(settings.priorities, count).tolist()
    requests = tuple(
        PlannedRequest(at_s, prefix, *pair, seed, priority)
        for at_s, prefix, pair, seed, priority in zip(
            times_s.tolist(), prefixes, fitted, seeds, priorities, strict=True
        )
    )
    check_sizes(requests)
    cut_count = sum(before != after for before, after in zip(drawn, fitted, strict=True))
    duration_s = settings.duration_s or DURATION_S
    notes = (*notes_of_means(settings), *notes_of_single_tokens(requests))
    return Workload(settings.profile, requests, duration_s, block_tokens, settings.seed, cut_count, notes)


def draw_pairs(
    settings: LoadSettings, count: int, generator: numpy.random.Generator
) -> list[tuple[int, int]]:
    """Tokens of prompt and output, as many pairs as asked for, before they are cut to a context."""
    prompts, outputs = (
        draw_lengths(shape, settings.scale, count, generator) for shape in shapes_of(settings).values()
    )
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def shapes_of(settings: LoadSettings) -> dict[str, LengthShape]:
    """How long prompts and outputs shall be, in this order, before scaling."""
    profile = PROFILES[settings.profile]
    return {"prompts": settings.prompt or profile.prompt, "outputs": settings.output or profile.output}


def notes_of_means(settings: LoadSettings) -> list[str]:
    """A note for each of both whose mean cannot be what was asked for."""
    return [
        f"{kind} have a mean of {mean_of(shape):.0f} tokens before scaling and not of {shape.mean:.0f}: "
        f"with a p50 of {shape.p50:.0f} and a p99 of {shape.p99:.0f} no lognormal has that."
        for kind, shape in shapes_of(settings).items()
        if abs(mean_of(shape) / shape.mean - 1) > MEAN_MISS_MAX
    ]


def prefix_share_of(settings: LoadSettings) -> float:
    """The share that settings ask for, or the profile's."""
    share = settings.prefix_share
    return PROFILES[settings.profile].prefix_share if share is None else share


def arrivals_of(settings: LoadSettings) -> Arrivals:
    """The arrivals that settings ask for; raises InvalidRequest if they are too many."""
    duration_s = settings.duration_s or DURATION_S
    if settings.rate_per_s * duration_s > REQUESTS_COUNT_MAX:
        message = f"{settings.rate_per_s:g} requests/s for {duration_s:g} s are too many"
        raise refused("--rate", message, f"{REQUESTS_COUNT_MAX} requests", "Ask for a lower rate.")
    cv = PROFILES[settings.profile].gap_cv if settings.gap_cv is None else settings.gap_cv
    return Arrivals(settings.rate_per_s, duration_s, cv, settings.burst_factor, settings.burst_period_s)


def arrival_times(arrivals: Arrivals, generator: numpy.random.Generator) -> numpy.ndarray:
    """Seconds, ascending, below the duration `[rate x duration]`: the count is exact, the gaps are random.

    A Gamma process given its count is its gaps scaled to fill the time; at a CV of 1 that is Poisson's.
    """
    count = max(1, round(arrivals.rate_per_s * arrivals.duration_s))
    gaps = generator.gamma(1 / arrivals.gap_cv**2, size=count + 1)
    if not gaps.sum() > 0:  # tiny shapes may draw nothing but zeros
        gaps = numpy.ones(count + 1)
    even = numpy.cumsum(gaps[:-1]) / gaps.sum() * arrivals.duration_s
    period_start = numpy.floor(even / arrivals.burst_period_s) * arrivals.burst_period_s
    return period_start + (even - period_start) / arrivals.burst_factor


def draw_prefixes(
    prompt_tokens: list[int], share: float, block_tokens: int, generator: numpy.random.Generator
) -> list[tuple[int, ...]]:
    """Blocks of each prompt that lie in the tree: whole ones, `share` of all prompt tokens in the mean."""
    popular = generator.random(len(prompt_tokens)) ** POPULARITY
    leaves = (popular * 2**FORKS_COUNT).astype(numpy.int64).tolist()
    thresholds = generator.random(len(prompt_tokens)).tolist()
    prefixes = []
    for tokens_count, leaf, threshold in zip(prompt_tokens, leaves, thresholds, strict=True):
        wanted = tokens_count * share / block_tokens
        blocks_count = int(wanted) + (threshold < wanted - int(wanted))
        blocks_count = min(blocks_count, tokens_count // block_tokens)
        prefixes.append(tuple(block_at(leaf, depth) for depth in range(blocks_count)))
    return prefixes


def block_at(leaf: int, depth: int) -> int:
    """Id of the block at a depth on the way from the root to a leaf and, past it, on and on."""
    return (depth << FORKS_COUNT) | (leaf >> max(0, FORKS_COUNT - depth))
