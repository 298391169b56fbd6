"""What every actor of a cluster is told when it starts."""

import math
import secrets
from dataclasses import dataclass, field

from cluster.config import AUTO, ClusterConfig
from cluster.errors import InvalidConfig
from cluster.scaling import AutoscalerConfig, PoolLimits
from cluster.token_file import read_token
from experts.config import PlanConfig
from experts.expert_size import expert_bytes
from experts.rebalance import RebalanceConfig
from kernels.model.config import ModelConfig
from kernels.model.pages import PAGE_TOKENS
from kernels.ops.fp8_sizes import packed_bytes
from kernels.transport.sockets import own_host

ACTORS_MAX = 1024
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Place:
    """The configuration, the channels' secret, and a folder for unix sockets that only this user enters."""

    config: ClusterConfig
    secret: str = field(repr=False)
    sockets_folder: str
    operations_token: str = field(default="", repr=False)
    """What the Pools page asks for."""

    def address(self, name: str) -> str:
        """Where a member of this name listens."""
        return self._address(self.config.transport.scheme, name)

    def tensors_address(self, name: str) -> str:
        """Where a member takes tensors from other GPUs; empty where they come like everything else."""
        tensors = self.config.transport.tensors
        return "" if tensors == "host" else self._address(tensors, f"{name}-tensors")

    def _address(self, scheme: str, name: str) -> str:
        if scheme in ("unix", "cuda-ipc"):
            return f"{scheme}://{self.sockets_folder}/{name}.sock"
        host = self.config.transport.host
        return f"{scheme}://{own_host() if host == AUTO else host}:0"


def make_place(config: ClusterConfig, sockets_folder: str) -> Place:
    """The place of a new cluster, with the secret that its file holds or a new one; raises InvalidConfig."""
    secret = read_token(config.transport.secret_file, "transport.secret_file")
    token = read_token(config.operations.token_file, "operations.token_file")
    return Place(config, secret or secrets.token_hex(32), sockets_folder, token or secrets.token_urlsafe(24))


def plan_config(model: ModelConfig, config: ClusterConfig) -> PlanConfig:
    """How many replicas experts have, in the memory that a shard has for them."""
    section = config.experts
    slots_max = model.routed_experts_count
    if section.weights_bytes is not None and model.moe_layers:
        slots_max = section.weights_bytes // (len(model.moe_layers) * kept_expert_bytes(model, config))
    return PlanConfig(section.replicas_min, section.spare_replicas, max(slots_max, 1))


def shards_bounds(model: ModelConfig, config: ClusterConfig) -> tuple[int, int]:
    """Fewest shards that can hold all experts as often as is wanted, and most that there are experts for."""
    if not model.moe_layers:
        return 1, config.experts.shards_max or config.experts.shards_count
    plan, experts_count = plan_config(model, config), model.routed_experts_count
    needed_count = math.ceil(experts_count * plan.replicas_min / plan.slots_max)
    return max(needed_count, plan.replicas_min), experts_count


def rebalance_config(config: ClusterConfig) -> RebalanceConfig:
    """When experts move."""
    section = config.experts
    return RebalanceConfig(
        slowness_max=section.rebalance_slowness_max if section.rebalance else math.inf,
        pause_s=section.rebalance_pause_s,
        step_bytes_max=section.rebalance_step_bytes,
    )


def kept_expert_bytes(model: ModelConfig, config: ClusterConfig) -> int:
    """Memory of one expert of one layer, as shards keep it."""
    return expert_bytes(model, ITEM_BYTES[config.model.compute_dtype], keeps_fp8=shards_have_gpus(config))


def shards_have_gpus(config: ClusterConfig) -> bool:
    """Whether shards compute on GPUs; whoever asks may have none."""
    if config.model.device == AUTO:
        return config.experts.resources.get("GPU", 0) > 0
    return config.model.device == "cuda"


def check_shards(config: ClusterConfig, bounds: tuple[int, int]) -> None:
    """Raises InvalidConfig where so many shards have no room for the experts, or too few of them to hold."""
    (least, most), section = bounds, config.experts
    wanted = (("experts.shards_count", section.shards_count), ("experts.shards_max", section.shards_max))
    for key, count in wanted:
        if count is not None and not least <= count <= most:
            raise InvalidConfig(
                reason="WRONG_SHARDS_COUNT",
                message=f"{count} shards cannot hold the experts as the configuration wants them",
                field=key,
                limit=f"{least} to {most}",
                remedy="Ask for a count within the limit, or change experts.weights_bytes or replicas_min.",
            )


def autoscaler_config(
    config: ClusterConfig, shards_bounds: tuple[int, int] = (1, ACTORS_MAX)
) -> AutoscalerConfig:
    """Between which counts pools move, and why; raises InvalidConfig for shards outside of their bounds."""
    check_shards(config, shards_bounds)
    section, gateways, experts = config.autoscaler, config.gateway.count, config.experts
    pools = (
        PoolLimits("gateway", gateways, 1, ACTORS_MAX),
        PoolLimits("prefill", config.prefill.count, config.prefill.count_min, config.prefill.count_max),
        PoolLimits("decode", config.decode.count, config.decode.count_min, config.decode.count_max),
        PoolLimits(
            "experts",
            experts.shards_count,
            max(experts.shards_min or experts.shards_count, shards_bounds[0]),
            experts.shards_max or experts.shards_count,
        ),
    )
    return AutoscalerConfig(
        pools,
        section.enabled,
        section.time_to_first_token_s,
        section.inter_token_s,
        section.grow_pause_s,
        section.shrink_pause_s,
    )


def latent_bytes(model: ModelConfig, config: ClusterConfig) -> int:
    """Memory of one token's latent of one layer."""
    if config.model.latents == "fp8":
        return packed_bytes(model.kv_lora_rank, model.qk_rope_head_dim)
    return model.latent_dim * ITEM_BYTES[config.model.compute_dtype]


def context_tokens_max(model: ModelConfig, config: ClusterConfig) -> int:
    """Prompt and output of a request: what the model was made for, and what any one node can hold."""
    page_bytes = model.layers_count * PAGE_TOKENS * latent_bytes(model, config)
    smallest_bytes = min(config.prefill.latents_bytes, config.decode.latents_bytes)
    return min(model.positions_max, smallest_bytes // page_bytes * PAGE_TOKENS)
