"""What a shard, and a node that dispatches to shards, must be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardConfig:
    """One shard: its name in the cluster, where it listens, and the secret of the cluster's channels."""

    name: str
    address: str
    secret: str


@dataclass(frozen=True)
class DispatchConfig:
    """How a node reaches shards: its own name there, the cluster's secret, how long it waits and retries."""

    name: str
    secret: str
    timeout_s: float = 30.0
