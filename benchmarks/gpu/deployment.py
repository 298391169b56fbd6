"""From times of a few layers on one GPU to tokens per second of a whole deployment: arithmetic, line by line.

A deployment has nodes, which hold the attention half of every layer, and shards, which hold some experts of
every layer; each is one GPU. A node's step carries its tokens through all layers:

    node   = beside layers + dense layers x dense + MoE layers x half
    shard  = MoE layers x expert time for (nodes x tokens x choices / shards) slots

Without overlap a step takes both, one after the other; with two micro-batches that alternate it takes, at
best, in each MoE layer the longer of the two. The truth of a deployment lies between, before its network:
what a node sends and receives in a layer is told beside, with the time that one link of 50 GB/s needs for it.
"""

from dataclasses import asdict, dataclass

LINK_GB_S = 50.0  # 400 Gb/s, one adapter for each GPU
SENT_BYTES, RETURNED_BYTES = 1, 2  # of a number: FP8 there, bfloat16 back
PUBLISHED = "DeepSeek told of 73,700 tokens/s in and 14,800 out for 8 H800: 9,212 and 1,850 a GPU"


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model the arithmetic needs."""

    dense_layers: int
    moe_layers: int
    experts: int
    choices: int
    hidden: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of one node's step with so many new tokens, in microseconds."""

    tokens: int
    beside_us: float
    """What is not in layers: embedding, the last norm, logits, and what the host adds."""
    dense_us: float
    half_us: float
    """A MoE layer without its routed experts."""
    whole_us: float
    """A MoE layer with all routed experts on this GPU."""

    @classmethod
    def of(
        cls,
        tokens: int,
        none_us: float,
        dense_us: float,
        half_us: float,
        whole_us: float,
        dense: int,
        moe: int,
    ) -> "StepTimes":
        """From steps through no layer, `dense` layers, and those with `moe` layers in two ways."""
        return cls(
            tokens,
            none_us,
            (dense_us - none_us) / max(dense, 1),
            (half_us - dense_us) / moe,
            (whole_us - dense_us) / moe,
        )


@dataclass(frozen=True, slots=True)
class Deployment:
    """How many GPUs do what."""

    nodes: int
    shards: int

    def experts_each(self, shape: Shape) -> int:
        """Experts of a layer that a shard holds."""
        return -(-shape.experts // self.shards)

    def slots_each(self, shape: Shape, tokens: int) -> int:
        """Slots that a shard computes in a layer, for nodes with so many new tokens each."""
        return max(1, self.nodes * tokens * shape.choices // self.shards)


DEPLOYMENTS = (Deployment(32, 32), Deployment(64, 64), Deployment(64, 32))


@dataclass(frozen=True, slots=True)
class Projection:
    """What a deployment would do."""

    nodes: int
    shards: int
    tokens_a_node: int
    slots_a_shard: int
    shard_layer_us: float
    node_ms: float
    apart_ms: float
    """A step without overlap."""
    overlapped_ms: float
    """A step with the best overlap there can be."""
    network_mb: float
    """What a node sends and receives in a layer."""

    def tokens_s(self, step_ms: float) -> float:
        """Of the whole deployment."""
        return self.nodes * self.tokens_a_node / step_ms * 1e3

    def figures(self) -> dict[str, float]:
        """For a file."""
        gpus = self.nodes + self.shards
        rates = {"tokens/s apart": self.tokens_s(self.apart_ms)}
        rates["tokens/s overlapped"] = self.tokens_s(self.overlapped_ms)
        rates |= {f"{name} a GPU": rate / gpus for name, rate in rates.items()}
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in (asdict(self) | rates).items()
        }


def project(shape: Shape, times: StepTimes, deployment: Deployment, shard_us: float) -> Projection:
    """A deployment whose shards take `shard_us` for a layer's slots."""
    before = times.beside_us + shape.dense_layers * times.dense_us
    node = before + shape.moe_layers * times.half_us
    numbers = times.tokens * shape.choices * shape.hidden
    return Projection(
        deployment.nodes,
        deployment.shards,
        times.tokens,
        deployment.slots_each(shape, times.tokens),
        shard_us,
        node / 1e3,
        (node + shape.moe_layers * shard_us) / 1e3,
        (before + shape.moe_layers * max(times.half_us, shard_us)) / 1e3,
        numbers * (SENT_BYTES + RETURNED_BYTES) / 1e6,
    )


def lines_of(shape: Shape, times: StepTimes, deployment: Deployment, projection: Projection) -> list[str]:
    """The arithmetic in sentences."""
    moe, gpus = shape.moe_layers, deployment.nodes + deployment.shards
    apart, overlapped = (
        projection.tokens_s(step) for step in (projection.apart_ms, projection.overlapped_ms)
    )
    link_us = projection.network_mb * 1e3 / LINK_GB_S
    return [
        f"{deployment.nodes} nodes of {times.tokens:,} tokens a step, {deployment.shards} shards of "
        f"{deployment.experts_each(shape)} experts:",
        f"  node   {times.beside_us:,.0f} + {shape.dense_layers} x {times.dense_us:,.0f} + {moe} x "
        f"{times.half_us:,.0f} µs = {projection.node_ms:,.2f} ms",
        f"  shard  {deployment.nodes} x {times.tokens:,} x {shape.choices} / {deployment.shards} = "
        f"{projection.slots_a_shard:,} slots a layer in {projection.shard_layer_us:,.0f} µs",
        f"  step   {projection.node_ms:,.2f} ms + {moe} x {projection.shard_layer_us:,.0f} µs = "
        f"{projection.apart_ms:,.2f} ms apart; {projection.overlapped_ms:,.2f} ms with the longer of "
        f"{times.half_us:,.0f} and {projection.shard_layer_us:,.0f} µs in each MoE layer",
        f"  rate   {deployment.nodes} x {times.tokens:,} / step = {apart:,.0f} to {overlapped:,.0f} tokens/s "
        f"on {gpus} GPUs: {apart / gpus:,.0f} to {overlapped / gpus:,.0f} each",
        f"  left out: the network, {projection.network_mb:,.1f} MB a node and MoE layer, {link_us:,.0f} µs "
        f"at {LINK_GB_S:.0f} GB/s",
    ]
