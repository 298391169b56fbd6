"""How a context is split among programs that attend to it side by side.

A request of `length` tokens has splits of `unit_tokens * max(1, ceil(length / (unit_tokens * splits_count)))`
tokens: of whole units, evenly, in at most `splits_count` splits.
"""

from dataclasses import dataclass

# A split costs scratch, written once and read once: 4 KB a row, against 1,152 bytes a token that are read
# anyway. With 1,024 tokens that is 6 % of the traffic of 16 rows, and 22 % of that of 64, which wait for
# products and not for memory. Half as many tokens would double it; twice as many would leave half of 132
# multiprocessors idle with 16 requests of 4,096 tokens and 128 heads.
INVARIANT_UNIT_TOKENS = 1024
# Bounds the scratch: 1 GB for 128 requests of 128 heads, however long. From 32,768 tokens on splits grow.
INVARIANT_SPLITS_MAX = 32

UNIT_TOKENS = 256
SPLIT_COST_TOKENS = 128  # to start a program, leave its mean and merge it, as tokens read in that time


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """At most `splits_count` splits a request, each of a multiple of `unit_tokens`."""

    unit_tokens: int
    splits_count: int


def invariant_split_plan(context_tokens_max: int) -> SplitPlan:
    """Splits that follow from a request's own length alone: its bits do not depend on its batch.

    `context_tokens_max`, which they share, only leaves out splits that would hold nothing.
    """
    splits_count = -(-context_tokens_max // INVARIANT_UNIT_TOKENS)
    return SplitPlan(INVARIANT_UNIT_TOKENS, min(max(splits_count, 1), INVARIANT_SPLITS_MAX))


def split_plan(
    requests_count: int, row_tiles_count: int, context_tokens_max: int, running_count: int
) -> SplitPlan:
    """Splits by which a batch is done soonest: programs come in waves of as many as run at the same time.

    Of plans that take the same time the one of fewest splits is chosen.
    """
    tiles_count = requests_count * row_tiles_count

    def time_tokens(splits_count: int) -> int:
        waves_count = -(-tiles_count * splits_count // running_count)
        units_count = -(-context_tokens_max // (UNIT_TOKENS * splits_count))
        return waves_count * (units_count * UNIT_TOKENS + SPLIT_COST_TOKENS * (splits_count > 1))

    splits_max = max(1, -(-context_tokens_max // UNIT_TOKENS))
    return SplitPlan(UNIT_TOKENS, min(range(1, splits_max + 1), key=time_tokens))
