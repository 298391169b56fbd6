"""One thing to measure: how it is made ready, what it must give, and who else can do it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.work import Work

Run = Callable[[], torch.Tensor | tuple[torch.Tensor, ...] | None]


@dataclass(slots=True)
class Ready:
    """A case whose inputs are on the device."""

    run: Run
    work: Work
    error: Callable[[], float]
    """Relative error of what `run` gives, against a reference that torch computes."""
    peers: dict[str, Callable[[], Run]] = field(default_factory=dict)
    """By name: what makes a peer ready; what it then gives is compared with what `run` gives."""
    tolerance: float = 1e-2


@dataclass(frozen=True, slots=True)
class Case:
    """A named case of one operation."""

    operation: str
    sizes: str
    make: Callable[[torch.device], Ready]

    @property
    def name(self) -> str:
        """Unique among all."""
        return f"{self.operation} {self.sizes}"


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """`|out - expected| / |expected|` in float32; NaN where either has one or shapes differ."""
    if out.shape != expected.shape:
        return float("nan")
    out, expected = out.float(), expected.float().to(out.device)
    return float((out - expected).norm() / expected.norm().clamp_min(1e-30))


def share_differing(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of integers that are not the expected ones; NaN where shapes differ."""
    if out.shape != expected.shape:
        return float("nan")
    return float((out != expected.to(out.device)).float().mean())


def first(outcome: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The first of several results."""
    return outcome[0] if isinstance(outcome, tuple) else outcome
