"""The metrics of nodes, shards and experts."""

from cluster.metric_name import COUNTER, GAUGE, HISTOGRAM, metrics_of

NODES = (
    *metrics_of(
        GAUGE,
        ("pool", "node"),
        (
            "trivium_node_requests_running",
            "requests",
            "Requests that a node works on or hands over.",
            "requests_running_count",
        ),
        (
            "trivium_node_requests_waiting",
            "requests",
            "Requests that a node has and does not work on yet.",
            "requests_waiting_count",
        ),
        (
            "trivium_node_waiting_tokens",
            "tokens",
            "Prompt tokens that wait to be computed.",
            "tokens_waiting_count",
        ),
        (
            "trivium_node_arriving_pages",
            "pages",
            "Leased pages of a decode node whose requests still wait for latents.",
            "pages_arriving_count",
        ),
        (
            "trivium_node_experts_epoch",
            "",
            "Number of the placement of experts that a node goes by; 0 before the first.",
            "experts_epoch",
        ),
    ),
    *metrics_of(
        GAUGE,
        ("pool", "node", "state"),
        ("trivium_node_pages", "pages", "Pages of 64 tokens, each free, cached or leased."),
    ),
    *metrics_of(
        COUNTER,
        ("pool", "node"),
        (
            "trivium_node_tokens_total",
            "tokens",
            "Tokens that a node computed: of prompts in prefill, of answers in decode.",
            "tokens_count",
        ),
        (
            "trivium_node_cached_tokens_total",
            "tokens",
            "Prompt tokens that a prefill node found in its pages instead.",
            "cached_tokens_count",
        ),
        ("trivium_node_steps_total", "steps", "Steps that a node computed.", "steps_count"),
        ("trivium_node_busy_seconds_total", "seconds", "Time that a node spent in steps.", "busy_s"),
        (
            "trivium_node_latents_bytes_total",
            "bytes",
            "Latents that a prefill node sent, or a decode node received.",
            "latents_bytes",
        ),
        (
            "trivium_node_receiving_seconds_total",
            "seconds",
            "Time in which frames of latents came in to a decode node, all channels together.",
            "receiving_s",
        ),
        (
            "trivium_node_transfer_seconds_total",
            "seconds",
            "Time for which latents were on their way once their prompt was computed, all prompts together.",
            "transfer_s",
        ),
        (
            "trivium_node_refused_frames_total",
            "frames",
            "Frames and peers that a node refused.",
            "refused_frames_count",
        ),
    ),
    *metrics_of(
        COUNTER,
        ("pool", "node", "reason"),
        (
            "trivium_node_failures_total",
            "requests",
            "Attempts at requests that failed at a node.",
            "failures",
        ),
    ),
)

DISPATCH = (
    *metrics_of(
        HISTOGRAM,
        ("pool", "node"),
        (
            "trivium_dispatch_seconds",
            "seconds",
            "From the dispatch of a layer's tokens to the last shard's answer.",
        ),
    ),
    *metrics_of(
        COUNTER,
        ("pool", "node"),
        (
            "trivium_dispatch_waited_seconds_total",
            "seconds",
            "Time in which a node did nothing but wait for shards.",
            "waited_s",
        ),
        (
            "trivium_dispatch_retries_total",
            "dispatches",
            "Dispatches sent anew after a shard failed or refused.",
            "retries_count",
        ),
        (
            "trivium_dispatch_given_up_total",
            "dispatches",
            "Dispatches that were not answered in the time allowed.",
            "given_up_count",
        ),
    ),
)

SHARDS = (
    *metrics_of(
        COUNTER,
        ("node",),
        (
            "trivium_shard_dispatches_total",
            "dispatches",
            "Dispatches that a shard computed.",
            "dispatches_count",
        ),
        (
            "trivium_shard_slots_total",
            "slots",
            "Pairs of token and expert that a shard computed.",
            "slots_count",
        ),
        (
            "trivium_shard_refused_total",
            "dispatches",
            "Dispatches and peers that a shard refused.",
            "refused_count",
        ),
        (
            "trivium_shard_fetched_experts_total",
            "experts",
            "Experts that a shard loaded from other shards instead of the checkpoint.",
            "fetched_count",
        ),
        ("trivium_shard_busy_seconds_total", "seconds", "Time that a shard spent computing.", "busy_s"),
    ),
    *metrics_of(
        GAUGE,
        ("node",),
        ("trivium_shard_experts", "experts", "Experts that a shard has by its placement.", "experts_count"),
        ("trivium_shard_epoch", "", "Number of the newest placement that a shard has loaded.", "epoch"),
    ),
)

EXPERTS = (
    *metrics_of(
        GAUGE,
        ("layers",),
        (
            "trivium_experts_balancedness_ratio",
            "0 to 1",
            "Mean load of a layer's shards over that of the fullest: mean over layers, and the worst layer.",
        ),
    ),
    *metrics_of(
        GAUGE,
        (),
        ("trivium_experts_slowness_ratio", "1 or more", "Time of all layers over that of even shards."),
        ("trivium_experts_moving", "0 or 1", "Whether experts move at the moment.", "is_moving"),
        ("trivium_experts_stalled", "0 or 1", "Whether a shard holds up what moves.", "is_stalled"),
        ("trivium_experts_unplaceable", "0 or 1", "Whether the shards there are cannot hold the experts."),
    ),
    *metrics_of(
        COUNTER,
        (),
        ("trivium_experts_rebalances_total", "rebalances", "Rebalances that were begun.", "rebalances_count"),
        (
            "trivium_experts_rollbacks_total",
            "rebalances",
            "Rebalances taken back, as they did not gain what they promised.",
            "rollbacks_count",
        ),
        (
            "trivium_experts_stalls_total",
            "rebalances",
            "Rebalances that a shard held up for too long.",
            "stalls_count",
        ),
    ),
)
