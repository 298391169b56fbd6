"""Replay of a trace in Mooncake's format: one JSON object a line.

`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of the prompt's blocks of 512 tokens, and,
if it likes, `priority`. Equal ids become equal blocks of tokens, so that prefixes are shared as they were.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.bench.settings import REQUESTS_COUNT_MAX, LoadSettings
from cluster.bench.workload import (
    BLOCK_ID_MAX,
    BLOCK_TOKENS,
    ModelLimits,
    PlannedRequest,
    Workload,
    check_sizes,
    fit_lengths,
    notes_of_single_tokens,
    scaled_block_tokens,
)
from cluster.errors import InvalidRequest
from cluster.validation import PRIORITY_MAX

FILE_BYTES_MAX = 1 << 30
LINE_BYTES_MAX = 1 << 20
LENGTH_MAX = 1 << 27
TIMESTAMP_MS_MAX = 10**15
BlockId = Annotated[int, Field(ge=0, le=BLOCK_ID_MAX)]


class TraceLine(BaseModel):
    """What one line holds; what else it has is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")

    timestamp: float = Field(ge=0, le=TIMESTAMP_MS_MAX, allow_inf_nan=False)
    input_length: int = Field(ge=1, le=LENGTH_MAX)
    output_length: int = Field(ge=1, le=LENGTH_MAX)
    hash_ids: list[BlockId] = Field(default_factory=list, max_length=LENGTH_MAX // BLOCK_TOKENS)
    priority: int = Field(0, ge=-PRIORITY_MAX, le=PRIORITY_MAX)


def plan_trace(path: Path, settings: LoadSettings, model: ModelLimits) -> Workload:
    """The requests of a trace from its first on, by time; raises InvalidRequest with line and field."""
    lines = sorted(read_lines(path), key=lambda line: line.timestamp)
    start_ms = lines[0].timestamp if lines else 0.0
    planned: list[PlannedRequest] = []
    cut_count = 0
    for number, line in enumerate(lines):
        at_s = (line.timestamp - start_ms) / 1000 / settings.speed
        if settings.duration_s is not None and at_s >= settings.duration_s:
            break
        wanted = scaled(line.input_length, settings.scale), scaled(line.output_length, settings.scale)
        lengths = fit_lengths(*wanted, model.context_tokens_max)
        cut_count += lengths != wanted
        seed = settings.seed + number
        planned.append(PlannedRequest(at_s, tuple(line.hash_ids), *lengths, seed, line.priority))
    check_sizes(planned)
    longest_s = math.inf if settings.duration_s is None else settings.duration_s
    is_cut = len(planned) < len(lines)  # one that ended before offers nothing after its end
    duration_s = longest_s if is_cut else min(longest_s, max(1.0, planned[-1].at_s))
    block_tokens = scaled_block_tokens(settings.scale)
    notes = tuple(notes_of_single_tokens(planned))
    return Workload(path.stem, tuple(planned), duration_s, block_tokens, settings.seed, cut_count, notes)


def scaled(length: int, scale: float) -> int:
    """A length of a model that is so much smaller, at least 1."""
    return max(1, round(length * scale))


def read_lines(path: Path) -> Iterator[TraceLine]:
    """The lines of a trace in their order; raises InvalidRequest at the first that is none."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise bad_trace(f"{path.name} is too large", f"{FILE_BYTES_MAX} bytes", "Cut it.")
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                if number > REQUESTS_COUNT_MAX:
                    raise bad_trace(f"{path.name} has too many lines", f"{REQUESTS_COUNT_MAX}", "Cut it.")
                if raw.strip():
                    yield read_line(raw, number)
    except OSError as error:
        raise bad_trace(f"{path.name} cannot be read: {error.strerror}") from error


def read_line(raw: bytes, number: int) -> TraceLine:
    """One line; raises InvalidRequest that names it and the field."""
    if len(raw) > LINE_BYTES_MAX:
        raise bad_line(number, "", f"is longer than {LINE_BYTES_MAX} bytes")
    try:
        line = TraceLine.model_validate(json.loads(raw))
    except ValidationError as error:
        first = error.errors()[0]
        raise bad_line(number, ".".join(map(str, first["loc"])), first["msg"]) from error
    except (ValueError, RecursionError) as error:
        raise bad_line(number, "", "is not JSON") from error
    if line.hash_ids and len(line.hash_ids) * BLOCK_TOKENS < line.input_length:
        message = f"{len(line.hash_ids)} blocks are too few for {line.input_length} tokens"
        raise bad_line(number, "hash_ids", message)
    return line


def bad_line(number: int, field: str, message: str) -> InvalidRequest:
    """What is told of a line."""
    where = f"line {number}, {field}" if field else f"line {number}"
    remedy = (
        "A line is an object with timestamp (ms), input_length, output_length and hash_ids, "
        f"one for each {BLOCK_TOKENS} tokens of the prompt or part of it."
    )
    return bad_trace(f"{where}: {message}", remedy=remedy)


def bad_trace(
    message: str, limit: str | None = None, remedy: str = "Name a JSONL file in Mooncake's format."
) -> InvalidRequest:
    """What is told of a trace that cannot be replayed."""
    return InvalidRequest(reason="BAD_TRACE", message=message, field="--trace", limit=limit, remedy=remedy)
