"""One YAML file makes one cluster: every key, its default, and what it means.

Only `model.folder` has no default. Relative paths are relative to the file that names them.
"""

import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from cluster.config_errors import explained
from cluster.config_file import read_yaml

PORT_MAX = 65535
AUTO = "auto"

_UNITS_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: Any) -> Any:
    """Read sizes such as "256MiB" or "1.5 GB" as bytes; anything that is no text is left as it is."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?([A-Za-z]{1,3})", value.strip())
    unit_bytes = _UNITS_BYTES.get(match[2].upper()) if match else None
    if match is None or unit_bytes is None:
        raise ValueError("a size is a number of bytes, or a number with a unit such as 256MiB or 2GB")
    return int(float(match[1]) * unit_bytes)


def resolve_path(value: Any, info: ValidationInfo) -> Any:
    """Read a path, relative to the folder in the validation context (else to the working directory)."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("a path is a text that is not empty")
    path = Path((info.context or {}).get("folder", ".")) / Path(value).expanduser()
    return Path(os.path.abspath(path))  # links stay: where files are mounted, what they lead to changes


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
ResolvedPath = Annotated[Path, BeforeValidator(resolve_path)]
Host = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:_-]+$")]
NodesCount = Annotated[int, Field(ge=1, le=1024)]
Resources = Annotated[dict[str, Annotated[float, Field(gt=0, le=1e6)]], Field(max_length=16)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: frozen, with no key that it does not know and no guessing of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class ModelSection(Section):
    """Which model is served."""

    folder: ResolvedPath = Field(description="folder with config.json, *.safetensors and the tokenizer")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="in which numbers to compute; float32 is exact and best on CPUs"
    )
    latents: Literal["computed", "fp8"] = Field(
        "computed",
        description="how latents are kept and sent: as the numbers computed in, or as FP8 "
        "(656 bytes a token and layer of V3, where bfloat16 takes 1,152)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where nodes and shards compute; auto: on the GPU that Ray gives an actor, if any"
    )
    name: str = Field(
        "", max_length=128, description="what clients see as the model's name; empty: the folder's name"
    )

    @property
    def served_name(self) -> str:
        """The name that clients see."""
        return self.name or self.folder.name


class GatewaySection(Section):
    """Where clients come in."""

    count: NodesCount = Field(1, description="gateways, all on the same port")
    host: Host = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens it to other hosts")
    port: int = Field(50051, ge=0, le=PORT_MAX, description="gRPC port; 0 takes any free one")
    requests_waiting_max: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="requests of a gateway that may wait; more are shed with a retry time",
    )
    message_bytes_max: Annotated[Bytes, Field(ge=1024, le=2**30)] | None = Field(
        None, description="largest message from a client; empty: derived from the model's context"
    )
    tokens_max_default: int = Field(256, ge=1, description="max_tokens of a request that names none")
    stall_timeout_s: Seconds = Field(
        30.0,
        description="how long a stream may stay unread, once its buffers are full, until it is cancelled",
    )
    token_file: ResolvedPath | None = Field(
        None, description="file with the bearer token that clients must send; empty: none is asked for"
    )
    tls_certificate_file: ResolvedPath | None = Field(
        None, description="PEM chain of the gateways' certificate; with tls_key_file clients must speak TLS"
    )
    tls_key_file: ResolvedPath | None = Field(None, description="PEM key of that certificate")
    metrics_port: int | None = Field(
        None, ge=0, le=PORT_MAX, description="HTTP port of each gateway's /metrics and /healthz; empty: none"
    )
    resources: Resources = Field(
        {}, description="Ray resources that each actor takes, such as {GPU: 1}; they choose its host"
    )


class PrefillSection(Section):
    """The nodes that read prompts."""

    count: int = Field(1, ge=0, le=1024, description="prefill nodes; 0 only with decode.reads_prompts")
    count_min: NodesCount = Field(1, description="fewest that the autoscaler leaves")
    count_max: NodesCount = Field(8, description="most that the autoscaler starts")
    latents_bytes: Annotated[Bytes, Field(ge=2**20, le=2**44)] = Field(
        256 * 2**20,
        description="memory for latents on each node; the smaller of the two pools bounds a context",
    )
    step_tokens_max: int = Field(512, ge=1, le=1_000_000, description="tokens of all prompts in one step")
    requests_max: int = Field(32, ge=1, le=4096, description="prompts that a node works on at a time")
    resources: Resources = Field(
        {}, description="Ray resources that each actor takes, such as {GPU: 1}; they choose its host"
    )
    micro_batches: Literal[1, 2] = Field(
        1, description="2: one half of a step computes while the other's tokens are with the experts"
    )


class DecodeSection(Section):
    """The nodes that write answers."""

    count: NodesCount = Field(1, description="decode nodes")
    count_min: NodesCount = Field(1, description="fewest that the autoscaler leaves")
    count_max: NodesCount = Field(8, description="most that the autoscaler starts")
    latents_bytes: Annotated[Bytes, Field(ge=2**20, le=2**44)] = Field(
        256 * 2**20,
        description="memory for latents on each node; the smaller of the two pools bounds a context",
    )
    requests_max: int = Field(64, ge=1, le=4096, description="requests in one step of a node")
    reads_prompts: bool = Field(
        False, description="whether each decode node's process is a prefill node too, to compare with pools"
    )
    resources: Resources = Field(
        {}, description="Ray resources that each actor takes, such as {GPU: 1}; they choose its host"
    )
    micro_batches: Literal[1, 2] | None = Field(
        None,
        description="2: one half of a step computes while the other's tokens are with the experts; "
        "empty: 2 on GPUs, 1 on CPUs, which are never idle",
    )


class ExpertsSection(Section):
    """The shards that hold the experts."""

    shards_count: NodesCount = Field(2, description="shards over which the experts are spread")
    shards_min: NodesCount | None = Field(
        None, description="fewest that the autoscaler leaves; empty: shards_count"
    )
    shards_max: NodesCount | None = Field(
        None, description="most that the autoscaler starts; empty: shards_count"
    )
    resources: Resources = Field(
        {}, description="Ray resources that each actor takes, such as {GPU: 1}; they choose its host"
    )
    dispatch_timeout_s: Seconds = Field(
        30.0,
        description="how long a node waits for a shard's answer; one whose step takes four times as long, "
        "and two minutes at least, is replaced",
    )
    replicas_min: int = Field(
        1, ge=1, le=16, description="homes of each expert; with 2, any one shard may die and none is missed"
    )
    spare_replicas: int = Field(
        0, ge=0, le=4096, description="further replicas in each layer, for the experts with most tokens"
    )
    weights_bytes: Annotated[Bytes, Field(ge=2**10, le=2**44)] | None = Field(
        None, description="memory for experts on each shard; empty: what the replicas take"
    )
    rebalance: bool = Field(True, description="whether experts move to where the load asks for them")
    rebalance_slowness_max: float = Field(
        1.15, ge=1.0, le=100.0, description="time of the fullest shards over the mean beyond which they do"
    )
    rebalance_pause_s: Seconds = Field(30.0, description="rest between one rebalance and the next")
    rebalance_step_bytes: Annotated[Bytes, Field(ge=1, le=2**44)] = Field(
        2**30, description="weights that a shard may load at a time, beside those in use"
    )


class TransportSection(Section):
    """How latents, tokens and dispatches travel."""

    scheme: Literal["unix", "tcp"] = Field("unix", description="unix: one host, fastest; tcp: several hosts")
    host: Host = Field(
        "127.0.0.1",
        description="for tcp: where nodes and shards listen; auto: this host's address on the way to others",
    )
    tensors: Literal["host", "nccl", "cuda-ipc"] = Field(
        "host", description="how tensors go between GPUs: by hosts' memory; nccl; cuda-ipc, on one GPU"
    )
    secret_file: ResolvedPath | None = Field(
        None, description="file with the secret that channels ask for; empty: a new one with each start"
    )
    lease_s: Seconds = Field(10.0, description="how long reserved pages outlive the last sign of their owner")


class AutoscalerSection(Section):
    """How many nodes and shards there are, as the load asks; a count that a person sets holds."""

    enabled: bool = Field(False, description="whether counts follow the load; they can be set by hand anyway")
    period_s: Seconds = Field(2.0, description="time from one look at the load to the next")
    time_to_first_token_s: Seconds = Field(2.0, description="what a client should wait at most for a token")
    inter_token_s: Seconds = Field(0.1, description="what a client should wait at most for each further one")
    grow_pause_s: Seconds = Field(10.0, description="rest after a pool has grown, before it grows again")
    shrink_pause_s: Seconds = Field(60.0, description="how long a pool must be too large before it shrinks")


class OperationsSection(Section):
    """What people and monitors look at: the Pools page, and metrics of the whole cluster at /metrics."""

    enabled: bool = Field(True, description="whether the coordinator serves them")
    host: Host = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8266, ge=0, le=PORT_MAX, description="HTTP port; 0 takes any free one")
    token_file: ResolvedPath | None = Field(
        None, description="file with the operators' token: Pools page, scale, top, experts; empty: a new one"
    )
    ray_metrics: bool = Field(True, description="whether Ray's exporter carries the same metrics")
    traces_endpoint: str = Field(
        "", max_length=1024, description="OTLP address for traces, such as http://collector:4318; empty: none"
    )
    traces_share: float = Field(
        1.0, ge=0.0, le=1.0, description="share of requests traced, of those whose client has not decided"
    )
    json_logs: bool = Field(False, description="logs as one JSON object a line, for machines")
    coordinator_resources: Resources = Field(
        {}, description="Ray resources that the coordinator takes; they choose its host"
    )


class DashboardSection(Section):
    """Ray's dashboard."""

    enabled: bool = Field(
        True, description="whether to start it; off saves 3 s and 200 MB, but no pool can be scaled then"
    )
    port: int = Field(8265, ge=0, le=PORT_MAX, description="its port")


class ClusterConfig(Section):
    """All of it; what is left out takes its default."""

    model: ModelSection = Field(description=ModelSection.__doc__)
    gateway: GatewaySection = Field(GatewaySection(), description=GatewaySection.__doc__)
    prefill: PrefillSection = Field(PrefillSection(), description=PrefillSection.__doc__)
    decode: DecodeSection = Field(DecodeSection(), description=DecodeSection.__doc__)
    experts: ExpertsSection = Field(ExpertsSection(), description=ExpertsSection.__doc__)
    transport: TransportSection = Field(TransportSection(), description=TransportSection.__doc__)
    autoscaler: AutoscalerSection = Field(AutoscalerSection(), description=AutoscalerSection.__doc__)
    operations: OperationsSection = Field(OperationsSection(), description=OperationsSection.__doc__)
    dashboard: DashboardSection = Field(DashboardSection(), description=DashboardSection.__doc__)
    threads_per_actor: int = Field(1, ge=1, le=256, description="threads with which each process computes")

    @model_validator(mode="after")
    def _ports_differ(self) -> "ClusterConfig":
        ports = {
            "gateway.port": self.gateway.port,
            "gateway.metrics_port": self.gateway.metrics_port,
            "operations.port": self.operations.port if self.operations.enabled else None,
            "dashboard.port": self.dashboard.port if self.dashboard.enabled else None,
        }
        for (one, port), (other, same) in itertools.combinations(ports.items(), 2):
            if port and port == same:
                raise ValueError(f"{one} and {other} must differ")
        return self

    @model_validator(mode="after")
    def _counts_are_within_bounds(self) -> "ClusterConfig":
        experts = self.experts
        shards_min = experts.shards_min or experts.shards_count
        shards_max = experts.shards_max or experts.shards_count
        pools = (
            ("prefill.count", self.prefill.count_min, self.prefill.count, self.prefill.count_max),
            ("decode.count", self.decode.count_min, self.decode.count, self.decode.count_max),
            ("experts.shards_count", shards_min, experts.shards_count, shards_max),
        )
        for key, least, count, most in pools:
            if least > most:
                raise ValueError(f"{key}: its least, {least}, is above its most, {most}")
            if self.autoscaler.enabled and count and not least <= count <= most:
                raise ValueError(f"{key} is {count}: with autoscaler.enabled it lies in {least} to {most}")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "ClusterConfig":
        if (self.gateway.tls_certificate_file is None) != (self.gateway.tls_key_file is None):
            raise ValueError("gateway.tls_certificate_file and gateway.tls_key_file go together")
        return self

    @model_validator(mode="after")
    def _somebody_reads_prompts(self) -> "ClusterConfig":
        if self.prefill.count == 0 and not self.decode.reads_prompts:
            raise ValueError("prefill.count may be 0 only with decode.reads_prompts")
        if self.prefill.count == 0 and self.autoscaler.enabled:
            raise ValueError(
                "prefill.count may not be 0 with autoscaler.enabled: prompts would press on no pool, and none"
                " would grow; set prefill.count to 1 or more, or the autoscaler off"
            )
        if self.decode.reads_prompts and self.transport.tensors != "host":
            raise ValueError("decode.reads_prompts, two nodes on one GPU, wants transport.tensors: host")
        return self

    def with_overrides(
        self,
        *,
        model: Path | None = None,
        prefill: int | None = None,
        decode: int | None = None,
        shards: int | None = None,
        port: int | None = None,
    ) -> "ClusterConfig":
        """Replace what is not None, as a command line does, and check the whole again; or InvalidConfig."""
        values = self.model_dump(exclude_unset=True)
        named = {
            ("prefill", "count"): prefill,
            ("decode", "count"): decode,
            ("experts", "shards_count"): shards,
            ("gateway", "port"): port,
        }
        for (section, key), value in named.items():
            if value is not None:
                values.setdefault(section, {})[key] = value
        if model is not None:
            values["model"] = values.get("model", {}) | {"folder": model, "name": ""}
        return check_config(values, source="command line", folder=Path.cwd())


def load_config(path: Path) -> ClusterConfig:
    """Read and check a YAML file; or InvalidConfig, which names file, key, limit and remedy."""
    path = Path(path)
    return check_config(read_yaml(path), source=str(path), folder=path.parent)


def check_config(values: Any, source: str, folder: Path) -> ClusterConfig:
    """Check nested plain values; relative paths in them are relative to the folder. Or InvalidConfig."""
    try:
        return ClusterConfig.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        raise explained(error, source, ClusterConfig) from None
