"""What a decode node must be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeConfig:
    """One decode node: where it listens, how much it holds, and how long a lease lasts unless extended."""

    name: str
    address: str
    secret: str
    latents_bytes: int
    requests_max: int = 64
    micro_batches: int = 1
    lease_s: float = 30.0
    latents_address: str = ""
    """Where latents arrive, if not where gateways connect: between GPUs."""
    packs_latents: bool = False
    """Whether latents are kept and sent as FP8."""
    step_s_max: float = 120.0
    """A node whose step lasts longer counts as dead."""
