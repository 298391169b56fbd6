"""Every metric that Trivium publishes; here those of the cluster, its gateways and its pools."""

from cluster.metric_name import COUNTER, GAUGE, HISTOGRAM, INFO, metrics_of
from cluster.metric_names_of_nodes import DISPATCH, EXPERTS, NODES, SHARDS

CLUSTER = (
    *metrics_of(
        GAUGE,
        (),
        ("trivium_ready", "0 or 1", "Whether a request could be served now."),
        ("trivium_experts_epoch", "", "Number of the placement of experts that is in force."),
        ("trivium_experts_wanted_epoch", "", "Number of the placement that shards are to load."),
    ),
    *metrics_of(
        GAUGE,
        ("pool", "state"),
        ("trivium_actors", "actors", "Actors by what they serve as, and by starting, ready, draining."),
    ),
    *metrics_of(
        COUNTER,
        ("pool",),
        ("trivium_actors_lost_total", "actors", "Actors that fell silent without a farewell."),
    ),
    *metrics_of(
        GAUGE,
        ("pool", "node"),
        ("trivium_heartbeat_age_seconds", "seconds", "Time since the coordinator heard of an actor."),
        ("trivium_actor_loaded_ratio", "0 to 1", "Share of its weights that an actor has loaded."),
    ),
)

GATEWAY = (
    *metrics_of(
        COUNTER,
        ("node",),
        ("trivium_requests_admitted_total", "requests", "Requests that the gateway took.", "admitted_count"),
        (
            "trivium_requests_shed_total",
            "requests",
            "Requests refused because too many wait already.",
            "shed_count",
        ),
        (
            "trivium_requests_cancelled_total",
            "requests",
            "Requests whose client left before their end.",
            "cancelled_count",
        ),
        (
            "trivium_requests_retried_total",
            "attempts",
            "Further attempts at requests, after a node failed or was lost.",
            "retried_count",
        ),
        (
            "trivium_requests_migrated_total",
            "attempts",
            "Further attempts that go on behind tokens which the client has already.",
            "migrated_count",
        ),
        (
            "trivium_prompt_tokens_total",
            "tokens",
            "Prompt tokens of the requests taken.",
            "prompt_tokens_count",
        ),
        (
            "trivium_cached_tokens_total",
            "tokens",
            "Prompt tokens of finished requests that were found in pages.",
            "cached_tokens_count",
        ),
        ("trivium_output_tokens_total", "tokens", "Tokens given to clients.", "output_tokens_count"),
    ),
    *metrics_of(
        COUNTER,
        ("node", "reason"),
        (
            "trivium_requests_finished_total",
            "requests",
            "Requests that came to their end.",
            "finished_counts",
        ),
        ("trivium_requests_failed_total", "requests", "Requests that were given up.", "failed_counts"),
    ),
    *metrics_of(
        GAUGE,
        ("node",),
        ("trivium_requests_running", "requests", "Requests that are on nodes.", "requests_running_count"),
        ("trivium_requests_waiting", "requests", "Requests that wait for nodes.", "requests_waiting_count"),
        (
            "trivium_waiting_tokens",
            "tokens",
            "Prompt tokens of the requests that wait for nodes.",
            "prompt_tokens_waiting_count",
        ),
        (
            "trivium_waiting_pages",
            "pages",
            "Pages that requests which wait will want on decode nodes, growth included.",
            "pages_waiting_count",
        ),
    ),
    *metrics_of(
        HISTOGRAM,
        ("node",),
        (
            "trivium_time_to_first_token_seconds",
            "seconds",
            "From the call to the first token.",
            "time_to_first_token_s",
        ),
        (
            "trivium_inter_token_seconds",
            "seconds",
            "Time before each further token of a request.",
            "inter_token_s",
        ),
        ("trivium_end_to_end_seconds", "seconds", "From admission to the finish.", "end_to_end_s"),
        (
            "trivium_queued_seconds",
            "seconds",
            "From admission to the first token, less the prefill.",
            "queued_s",
        ),
        ("trivium_prefill_seconds", "seconds", "Time in which a prompt was computed.", "prefill_s"),
        (
            "trivium_transfer_seconds",
            "seconds",
            "Time for which latents were still on their way once their prompt was computed.",
            "transfer_s",
        ),
    ),
)

POOLS = (
    *metrics_of(
        GAUGE, (), ("trivium_autoscaler_enabled", "0 or 1", "Whether counts follow the load.", "is_enabled")
    ),
    *metrics_of(
        GAUGE,
        ("pool",),
        ("trivium_pool_target", "actors", "Actors that Serve aims at.", "target_count"),
        ("trivium_pool_ready", "actors", "Nodes that serve as this kind, borrowed ones too.", "ready_count"),
        ("trivium_pool_starting", "actors", "Nodes that load.", "starting_count"),
        ("trivium_pool_draining", "actors", "Nodes that finish what they have.", "draining_count"),
        ("trivium_pool_lent", "actors", "Actors that serve as the other kind.", "lent_count"),
        ("trivium_pool_borrowed", "actors", "Nodes that belong to the other pool.", "borrowed_count"),
        ("trivium_pool_min", "actors", "Fewest that the autoscaler leaves.", "count_min"),
        ("trivium_pool_max", "actors", "Most that the autoscaler starts.", "count_max"),
        ("trivium_pool_held", "0 or 1", "Whether a person has set the count, which then holds."),
    ),
    *metrics_of(
        GAUGE,
        ("pool", "cause"),
        (
            "trivium_pool_pressure_ratio",
            "1: at the limit",
            "What was measured over its limit; above 1 it hurts.",
        ),
    ),
    *metrics_of(
        COUNTER,
        ("pool",),
        ("trivium_pool_grown_total", "decisions", "Decisions for more actors.", "grown_count"),
        ("trivium_pool_shrunk_total", "decisions", "Decisions for fewer actors.", "shrunk_count"),
    ),
)

ALIASES = (
    *metrics_of(
        GAUGE,
        (),
        ("vllm:num_requests_waiting", "requests", "As trivium_requests_waiting.", "requests_waiting_count"),
        ("vllm:num_requests_running", "requests", "As trivium_requests_running.", "requests_running_count"),
        ("vllm:kv_cache_usage_perc", "0 to 1", "Share of all decode nodes' pages that is leased."),
    ),
    *metrics_of(
        INFO,
        ("block_size", "num_gpu_blocks"),
        ("vllm:cache_config_info", "1", "Tokens of a page, and pages of all decode nodes."),
    ),
)
"""Published by gateways alone, under the names that inference gateways' endpoint pickers read."""

GROUPS = {
    "Cluster": CLUSTER,
    "Requests, by gateway": GATEWAY,
    "Prefill and decode nodes": NODES,
    "Dispatches, as nodes see them": DISPATCH,
    "Shards": SHARDS,
    "Experts": EXPERTS,
    "Pools": POOLS,
    "Aliases": ALIASES,
}
EVERY = tuple(metric for group in GROUPS.values() for metric in group)
