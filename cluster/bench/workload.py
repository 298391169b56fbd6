"""Planned requests, and the tokens of their prompts, which are made only when one is sent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from cluster.bench.settings import OUTPUT_TOKENS_MAX, REQUESTS_COUNT_MAX, refused
from cluster.validation import RequestedGeneration, RequestedSampling

BLOCK_TOKENS = 512  # of a full-sized model; scaled as lengths are
OWN_BLOCK = 1 << 63  # ids from here on belong to one request alone
OWN_BLOCKS_COUNT_MAX = 1 << 40
BLOCK_ID_MAX = (1 << 62) - 1
SINGLE_TOKENS_SHARE_MAX = 0.2


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request; its prompt begins with shared blocks and goes on with tokens of its own."""

    at_s: float
    shared_blocks: tuple[int, ...]
    prompt_tokens_count: int
    output_tokens_count: int
    seed: int
    priority: int = 0


@dataclass(frozen=True)
class Workload:
    """Requests by time; the same seed and plan give the same tokens. `cut_count` were made to fit.

    `notes` say in what else the plan is not what was asked for.
    """

    name: str
    requests: tuple[PlannedRequest, ...]
    duration_s: float
    block_tokens: int
    seed: int
    cut_count: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelLimits:
    """What the served model can read and hold."""

    vocab_size: int
    context_tokens_max: int


def scaled_block_tokens(scale: float) -> int:
    """Tokens in a block of a model that is so much smaller, at least 1."""
    return max(1, round(BLOCK_TOKENS * scale))


def fit_lengths(prompt: int, output: int, context_tokens_max: int) -> tuple[int, int]:
    """Lengths cut to a context: outputs to half of it, then prompts to the rest."""
    output = min(output, max(1, context_tokens_max // 2))
    return min(prompt, max(1, context_tokens_max - output)), output


def notes_of_single_tokens(requests: Sequence[PlannedRequest]) -> list[str]:
    """A note if many outputs are one token alone, which tell nothing of the time from token to token."""
    share = sum(request.output_tokens_count == 1 for request in requests) / len(requests)
    if share <= SINGLE_TOKENS_SHARE_MAX:
        return []
    told = f"{share:.0%} of outputs are a single token and have no inter-token latency"
    return [f"{told}; a larger --scale makes them longer."]


def check_sizes(requests: Sequence[PlannedRequest]) -> None:
    """Raises InvalidRequest for none, or for more than can be kept in memory."""
    if not 1 <= len(requests) <= REQUESTS_COUNT_MAX:
        limit = f"1 to {REQUESTS_COUNT_MAX}"
        raise refused("workload", f"{len(requests)} requests are planned", limit, "Change rate or duration.")
    tokens_count = sum(request.output_tokens_count for request in requests)
    if tokens_count > OUTPUT_TOKENS_MAX:
        message = f"{tokens_count} tokens of output are planned"
        raise refused(
            "workload", message, str(OUTPUT_TOKENS_MAX), "Ask for a shorter run or a smaller scale."
        )


def as_requested(workload: Workload, index: int, vocab_size: int) -> RequestedGeneration:
    """The request at an index as it is sent: its tokens, its seed, and an output of just its length."""
    planned = workload.requests[index]
    return RequestedGeneration(
        token_ids=prompt_tokens(workload, index, vocab_size),
        sampling=RequestedSampling(
            temperature=1.0,
            seed=planned.seed,
            tokens_max=planned.output_tokens_count,
            ignore_eos=True,
        ),
        priority=planned.priority,
        client_request_id=f"bench-{index}",
    )


def prompt_tokens(workload: Workload, index: int, vocab_size: int) -> tuple[int, ...]:
    """Token ids of the prompt at an index: equal blocks give equal tokens, in any request."""
    planned = workload.requests[index]
    blocks_count = -(-planned.prompt_tokens_count // workload.block_tokens)
    shared = numpy.array(planned.shared_blocks[:blocks_count], dtype=numpy.uint64)
    own_count = blocks_count - len(shared)
    first = OWN_BLOCK + index * OWN_BLOCKS_COUNT_MAX
    own = numpy.arange(own_count, dtype=numpy.uint64) + numpy.uint64(first)
    salt = _mixed(numpy.array([workload.seed], dtype=numpy.uint64))
    keys = _mixed(numpy.concatenate([shared, own]) ^ salt)
    offsets = numpy.arange(workload.block_tokens, dtype=numpy.uint64)
    tokens = _mixed(keys[:, None] + offsets) % numpy.uint64(vocab_size)
    return tuple(tokens.reshape(-1)[: planned.prompt_tokens_count].tolist())


def _mixed(values: numpy.ndarray) -> numpy.ndarray:
    """Each uint64 scattered over all of them, as splitmix64 does; wraps on purpose."""
    values = values + numpy.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return values ^ (values >> numpy.uint64(31))
