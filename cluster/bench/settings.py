"""What a benchmark is asked to do, with its bounds; lengths and profiles in tokens of a full-sized model."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from pydantic import TypeAdapter

from cluster.errors import InvalidRequest
from cluster.validation import PRIORITY_MAX

REQUESTS_COUNT_MAX = 1_000_000
OUTPUT_TOKENS_MAX = 20_000_000  # of all requests together: each keeps the time at which it came
CONFIGS_COUNT_MAX = 8
PRIORITIES_COUNT_MAX = 16
OUTPUT_SUFFIXES = (".html", ".png", ".json")
BOUNDS = {  # option: lowest and highest value
    "--scale": (1e-6, 1e3),
    "--rate": (1e-3, 1e5),
    "--duration-s": (0.1, 86_400.0),
    "--cv": (0.01, 30.0),
    "--burst": (1.0, 1000.0),
    "--burst-period-s": (0.1, 86_400.0),
    "--prefix-share": (0.0, 1.0),
    "--speed": (1e-3, 1e6),
    "--seed": (0, 2**63 - 1),
    "--timeout-s": (0.1, 86_400.0),
    "--connections": (1, 64),
    "--slo-ttft-s": (1e-6, 86_400.0),
    "--slo-itl-s": (1e-6, 86_400.0),
}


@dataclass(frozen=True)
class LengthShape:
    """How long prompts or outputs are, in tokens."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Profile:
    """What was published of a real service's requests; `gap_cv` is of the gaps between arrivals."""

    prompt: LengthShape
    output: LengthShape
    gap_cv: float
    prefix_share: float


PROFILES = {
    "azure-code": Profile(LengthShape(2048, 1469, 7436), LengthShape(28, 13, 252), 13.0, 0.0),
    "azure-conversation": Profile(LengthShape(1155, 1020, 4142), LengthShape(211, 129, 601), 1.1, 0.0),
    "mooncake-conversation": Profile(
        LengthShape(12_035, 6909, 85_000), LengthShape(343, 350, 1119), 1.0, 0.37
    ),
}


@dataclass(frozen=True)
class LoadSettings:
    """Which requests to send and when; what is None is as the profile or the trace has it."""

    profile: str = "azure-conversation"
    scale: float = 1 / 64
    rate_per_s: float = 2.0
    duration_s: float | None = None
    gap_cv: float | None = None
    burst_factor: float = 1.0
    burst_period_s: float = 10.0
    prefix_share: float | None = None
    prompt: LengthShape | None = None
    output: LengthShape | None = None
    priorities: tuple[int, ...] = (0,)
    seed: int = 0
    trace: Path | None = None
    speed: float = 1.0


@dataclass(frozen=True)
class BenchSettings:
    """A benchmark of the cluster at an address, or of one cluster after the other from configurations."""

    load: LoadSettings = field(default_factory=LoadSettings)
    address: str = ""
    token_file: Path | None = None
    timeout_s: float = 120.0
    connections_count: int = 1
    slo_ttft_s: float = 1.0
    slo_itl_s: float = 0.1
    outputs: tuple[Path, ...] = ()
    json_output: bool = False
    configs: tuple[Path, ...] = ()


SETTINGS = TypeAdapter(BenchSettings)


def as_json(settings: BenchSettings) -> str:
    """Settings as a text that `from_json` reads."""
    return SETTINGS.dump_json(settings).decode()


def from_json(text: str) -> BenchSettings:
    """The settings in a text that `as_json` made; raises ValueError."""
    return SETTINGS.validate_json(text)


def check(settings: BenchSettings) -> BenchSettings:
    """The same settings, if every one is in its bounds; raises InvalidRequest."""
    load = settings.load
    numbers = {
        "--scale": load.scale,
        "--rate": load.rate_per_s,
        "--duration-s": load.duration_s,
        "--cv": load.gap_cv,
        "--burst": load.burst_factor,
        "--burst-period-s": load.burst_period_s,
        "--prefix-share": load.prefix_share,
        "--speed": load.speed,
        "--seed": load.seed,
        "--timeout-s": settings.timeout_s,
        "--connections": settings.connections_count,
        "--slo-ttft-s": settings.slo_ttft_s,
        "--slo-itl-s": settings.slo_itl_s,
    }
    for option, value in numbers.items():
        _check_bounds(option, value)
    if load.profile not in PROFILES:
        raise refused("--profile", f"there is no profile {load.profile!r}", ", ".join(PROFILES))
    for option, shape in (("--prompt-tokens", load.prompt), ("--output-tokens", load.output)):
        _check_shape(option, shape)
    _check_priorities(load.priorities)
    _check_files(settings)
    return settings


def parse_scale(text: str) -> float:
    """A scale such as 1/64 or 0.5; raises InvalidRequest."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise refused("--scale", f"{text!r} is no number", "a number or a fraction such as 1/64") from error


def parse_shape(option: str, text: str | None) -> LengthShape | None:
    """Lengths such as 1155/1020/4142, mean, p50 and p99; one number alone is all three."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split("/")]
        mean, p50, p99 = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError as error:
        raise refused(option, f"{text!r} is no length", "MEAN/P50/P99, such as 1155/1020/4142") from error
    return LengthShape(mean, p50, p99)


def parse_priorities(text: str) -> tuple[int, ...]:
    """Priorities such as -10,0,10; raises InvalidRequest."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise refused("--priorities", f"{text!r} are no priorities", "numbers such as -10,0,10") from error


def refused(field: str, message: str, limit: str, remedy: str = "Give one that fits.") -> InvalidRequest:
    """What is told of an option that cannot be used."""
    return InvalidRequest(reason="BAD_OPTION", message=message, field=field, limit=limit, remedy=remedy)


def _check_bounds(option: str, value: float | None) -> None:
    low, high = BOUNDS[option]
    if value is not None and not low <= value <= high:
        raise refused(option, f"{value:g} is out of range", f"{low:g} to {high:g}")


def _check_shape(option: str, shape: LengthShape | None) -> None:
    if shape is None:
        return
    inside = all(math.isfinite(number) and 0 < number <= 1e8 for number in (shape.mean, shape.p50, shape.p99))
    if not inside or shape.p99 < shape.p50:
        raise refused(option, "these lengths do not fit", "above 0, to 1e8 tokens, p99 at least p50")


def _check_priorities(priorities: tuple[int, ...]) -> None:
    fits = 1 <= len(priorities) <= PRIORITIES_COUNT_MAX
    if not fits or any(abs(priority) > PRIORITY_MAX for priority in priorities):
        limit = f"1 to {PRIORITIES_COUNT_MAX} of them, each from -{PRIORITY_MAX} to {PRIORITY_MAX}"
        raise refused("--priorities", "these do not fit", limit)


def _check_files(settings: BenchSettings) -> None:
    for output in settings.outputs:
        if output.suffix not in OUTPUT_SUFFIXES:
            raise refused("--output", f"{output} names no kind of report", ", ".join(OUTPUT_SUFFIXES))
        if not output.absolute().parent.is_dir():
            raise refused("--output", f"{output.parent} is no folder", "an existing folder", "Make it first.")
    if len(settings.configs) > CONFIGS_COUNT_MAX:
        raise refused(
            "CONFIG", f"{len(settings.configs)} are too many", f"{CONFIGS_COUNT_MAX} configurations"
        )
