"""What a shard, and a node that dispatches to shards, must be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardConfig:
    """One shard: its name in the cluster, where it listens, and the secret of the cluster's channels.

    At `weights_address` siblings fetch experts, whose bytes come from the host: no GPU is joined for them.
    """

    name: str
    address: str
    secret: str
    weights_address: str


@dataclass(frozen=True)
class DispatchConfig:
    """How a node reaches shards: its own name there, the cluster's secret, how long it waits and retries.

    A shard that says nothing for `silence_s` is passed over where others hold what it was asked for. `host`
    is where the node runs: of two homes equally loaded it takes the nearer.
    """

    name: str
    secret: str
    timeout_s: float = 30.0
    silence_s: float = 2.0
    host: str = ""


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """How many replicas: `replicas_min` of each expert or more, and `spare_replicas` in each layer."""

    replicas_min: int = 1
    spare_replicas: int = 0
    slots_max: int = 1 << 20
    """Experts of each layer that a shard has memory for."""
