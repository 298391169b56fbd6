"""What a prefill node must be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefillConfig:
    """One prefill node: where it listens, how much it holds, and how much it takes into one step."""

    name: str
    address: str
    secret: str
    latents_bytes: int
    step_tokens_max: int = 512
    requests_max: int = 64
    micro_batches: int = 1
    packs_latents: bool = False
    """Whether latents are kept and sent as FP8."""
    step_s_max: float = 120.0
    """A node whose step lasts longer counts as dead."""
