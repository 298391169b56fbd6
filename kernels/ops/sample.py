"""Choose the next token of each row: a function of (seed, position, logits) alone.

    x       = bans(penalties(logits))                                   [rows, vocab] fp32
    weight  = round(2^40 · exp((x - max x) / temperature))              [rows, vocab] int64
    kept    = weight, but 0 outside top-k, then top-p, then min-p
    token   = the first id whose running sum of kept passes u(seed, position) · sum of kept

Weights are integers because integers add up to the same sum in any order: whatever the device, the thread
count or the neighbours in the batch, a row draws the same token. The running sum goes by token id, not by
rank, so that two tokens of almost equal weight may swap ranks without changing the draw. A token below
2^-41 of the best one's weight is never drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops.backend import runs_kernel
from kernels.ops.draw_kernel import draw_kernel
from kernels.ops.sample_kernel import best_kernel

WEIGHT_ONE = 2**40  # the weight of the best token; a vocabulary of 2^22 tokens still sums below 2^63
LOG2_E = math.log2(math.e)  # exp2 of x times this is exp of x, and faster
MASK_64 = 2**64 - 1
GOLDEN_64 = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, made odd


class SampleError(ValueError):
    """Rows that have no next token; `reasons` maps each row's index to why, so that the others can go on."""

    def __init__(self, reasons: dict[int, str]):
        self.reasons = reasons
        super().__init__("; ".join(f"row {row}: {reason}" for row, reason in reasons.items()))


@dataclass(frozen=True, eq=False, slots=True)
class SampleRow:
    """What one request asks of its next token; the defaults are greedy and filter nothing."""

    seed: int = 0  # any integer; taken modulo 2^64
    position: int = 0  # the index of the token to be chosen in prompt + output
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # keep the k best tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens whose probabilities reach p, in (0, 1]
    min_p: float = 0.0  # drop tokens below this share of the best token's probability
    repetition_penalty: float = 1.0  # over prompt and output: divides positive logits, multiplies the rest
    presence_penalty: float = 0.0  # over output: subtracted once
    frequency_penalty: float = 0.0  # over output: subtracted once for each occurrence
    prompt_token_ids: Tensor | None = None  # [any] int64, repeats allowed; read by repetition_penalty alone
    output_token_counts: Tensor | None = None  # [vocab] int32; read by the penalties; None: no output yet
    banned_token_ids: tuple[int, ...] = ()
    logprobs_count: int | None = None  # None: no logprobs; 0: the chosen token's alone

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def is_ranked(self) -> bool:
        """Whether top-k or top-p drops tokens by their rank."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def is_penalised(self) -> bool:
        """Whether a penalty changes this row's logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the raw logits, before penalties, bans and temperature."""

    chosen: float
    top: list[tuple[int, float]]  # (token id, logprob), best first, ties by id


@dataclass(frozen=True, slots=True)
class Samples:
    """One entry for each row, in the order of the rows."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Samples:
    """Choose a token for each row of `logits` [rows, vocab] fp32, which stay as they are.

    Raises SampleError for rows with NaN or infinite logits, or with every token banned.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"logits have {logits.shape[0]} rows, but {len(rows)} rows ask for a token")
    adjusted = _adjusted(logits, rows)
    raw_best, raw_ids = _best(logits)
    best, token_ids = (raw_best, raw_ids) if adjusted is logits else _best(adjusted)
    drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
    if drawn and runs_kernel(logits):
        ranks = any(rows[index].is_ranked for index in drawn)
        draw_kernel(adjusted, best, token_ids, _asked(rows, logits.device), ranks)
    elif drawn:
        where = torch.tensor(drawn, device=logits.device)
        token_ids = token_ids.index_copy(0, where, _draw(adjusted[where], [rows[index] for index in drawn]))
    chosen = _checked(token_ids, raw_best, best)
    return Samples(chosen, [_logprobs(logits[i], token, rows[i]) for i, token in enumerate(chosen)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), multiple of 2^-53: SplitMix64 started at the mixed seed, `position` steps on.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014).
    """
    return (_mix_64(_mix_64(seed & MASK_64) + (position + 1) * GOLDEN_64 & MASK_64) >> 11) / 2**53


def _mix_64(bits: int) -> int:
    """SplitMix64's finaliser: each bit of a 64-bit number moves about half of the others."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK_64
    return bits ^ bits >> 31


def _checked(token_ids: Tensor, raw_best: Tensor, best: Tensor) -> list[int]:
    """Token ids as numbers: one transfer from the device brings them and the proof that they are sound."""
    ids, raw, adjusted = torch.stack((token_ids.double(), raw_best.double(), best.double())).tolist()
    finite = [math.isfinite(value) for value in raw]
    reasons = {index: "its logits hold NaN or infinity" for index, ok in enumerate(finite) if not ok}
    for index, value in enumerate(adjusted):
        if finite[index] and not math.isfinite(value):
            reasons[index] = "bans and penalties leave no finite logit"
    if reasons:
        raise SampleError(reasons)
    return [int(token) for token in ids]


def sample_each(logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Samples, dict[int, str]]:
    """As `sample`, but rows without a next token are told by index with why; what they get means nothing."""
    try:
        return sample(logits, rows), {}
    except SampleError as error:
        logits, rows = logits.clone(), list(rows)
        logits[list(error.reasons)] = 0.0
        for row in error.reasons:
            rows[row] = SampleRow()
        return sample(logits, rows), error.reasons


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each row, NaN if there is one, and the lowest token id that has it."""
    return best_kernel(logits) if runs_kernel(logits) else logits.max(dim=-1)


def _asked(rows: Sequence[SampleRow], device: torch.device) -> Tensor:
    """What `draw_kernel` reads of each row, [rows, 5] fp64: one transfer, for which nobody waits."""
    temperatures = [0.0 if row.is_greedy else row.temperature for row in rows]
    filters = [(row.top_k, row.top_p, row.min_p, uniform(row.seed, row.position)) for row in rows]
    asked = [(temperature, *rest) for temperature, rest in zip(temperatures, filters, strict=True)]
    here = torch.tensor(asked, dtype=torch.float64, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def _adjusted(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The logits after penalties and bans: a copy, or the logits themselves if no row has any."""
    changed = [index for index, row in enumerate(rows) if row.is_penalised or row.banned_token_ids]
    if not changed:
        return logits
    adjusted = logits.clone()
    for index in changed:
        _penalise(adjusted[index], rows[index])
        adjusted[index, list(rows[index].banned_token_ids)] = float("-inf")
    return adjusted


def _penalise(logits: Tensor, row: SampleRow) -> None:
    """Apply the penalties of one row to its logits [vocab], in place."""
    counts = row.output_token_counts
    if row.repetition_penalty != 1.0:
        seen = torch.zeros_like(logits, dtype=torch.bool) if counts is None else counts.to(logits.device) > 0
        if row.prompt_token_ids is not None:
            seen[row.prompt_token_ids.to(logits.device)] = True
        penalised = torch.where(logits > 0, logits / row.repetition_penalty, logits * row.repetition_penalty)
        logits.copy_(torch.where(seen, penalised, logits))
    if counts is not None:
        counts = counts.to(logits.device)
        logits.sub_(row.frequency_penalty * counts).sub_(row.presence_penalty * (counts > 0))


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Token ids [rows] int64, each from its own row of logits [rows, vocab] alone."""
    device = logits.device
    weights = _weights(logits.double(), _column([row.temperature for row in rows], device))
    if any(row.is_ranked for row in rows):
        top_p = _column([row.top_p for row in rows], device)
        weights = _keep_best(weights, [row.top_k for row in rows], top_p)
    if any(row.min_p > 0 for row in rows):
        weight_min = _column([row.min_p for row in rows], device) * WEIGHT_ONE
        weights = torch.where(weights >= weight_min, weights, 0)
    running = weights.cumsum(dim=-1)
    total = running[:, -1:]
    target = (_column([uniform(row.seed, row.position) for row in rows], device) * total).long()
    return torch.searchsorted(running, target.minimum(total - 1), right=True).squeeze(-1)


def _column(values: list[float], device: torch.device) -> Tensor:
    """One number for each row, [rows, 1] fp64."""
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(-1)


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Weights [rows, vocab] int64 in proportion to the probabilities; rows that are no numbers get zeros."""
    likelihood = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature * LOG2_E).exp2()
    return (likelihood.nan_to_num(nan=0.0) * WEIGHT_ONE).round().long()


def _keep_best(weights: Tensor, top_k: list[int], top_p: Tensor) -> Tensor:
    """Weights [rows, vocab] with zeros outside the k best and, of these, outside the fewest that reach p.

    Of equal weights at the border the lower token ids stay.
    """
    vocab = weights.shape[-1]
    rank_max = [min(k or vocab, vocab) for k in top_k]
    kept_count = torch.tensor(rank_max, device=weights.device).unsqueeze(-1)
    ranked = weights.topk(max(rank_max), dim=-1).values
    rank = torch.arange(ranked.shape[-1], device=weights.device)
    ranked = torch.where(rank < kept_count, ranked, 0)
    running = ranked.cumsum(dim=-1)
    short_of_p = running - ranked < top_p * running[:, -1:]  # whether the better ranks alone fall short
    reaching_count = short_of_p.sum(dim=-1, keepdim=True).clamp(min=1).minimum(kept_count)
    kept_count = torch.where(top_p < 1, reaching_count, kept_count)
    border = ranked.gather(-1, kept_count - 1)
    above = weights > border
    ties = weights == border
    ties &= ties.cumsum(dim=-1) <= kept_count - above.sum(dim=-1, keepdim=True)
    return torch.where(above | ties, weights, 0)


def _logprobs(logits: Tensor, token_id: int, row: SampleRow) -> TokenLogprobs | None:
    """The logprobs that one row asked for, from its raw logits [vocab]."""
    if row.logprobs_count is None:
        return None
    logprobs = logits.double().log_softmax(dim=-1)
    count = min(row.logprobs_count, logprobs.shape[-1])
    if count == 0:
        return TokenLogprobs(logprobs[token_id].item(), [])
    border = logprobs.topk(count).values[-1]
    candidates = (logprobs >= border).nonzero().squeeze(-1)  # more than count if some tie at the border
    pairs = zip(candidates.tolist(), logprobs[candidates].tolist(), strict=True)
    top = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count]
    return TokenLogprobs(logprobs[token_id].item(), top)
