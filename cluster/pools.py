"""The pools as Ray Serve deployments: beside the window of actors, the only file that knows Ray.

Serve starts, checks, restarts, drains and updates the actors, and its dashboard shows and scales them; no
token and no tensor ever goes through it.
"""

import hashlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from cluster.actors import DecodeActor, PrefillActor, ShardActor
from cluster.config import load_config
from cluster.coordinator import Coordinator
from cluster.errors import InvalidConfig
from cluster.gateway import GatewayActor
from cluster.place import Place, make_place
from cluster.post import DRAIN_S
from cluster.ray_window import RayWindow
from cluster.view import View
from kernels.transport.nccl import gpu_settings

APPLICATION = "trivium"
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
OBJECT_STORE_BYTES = 128 << 20
CONTROL_CALLS_MAX = 1000
CONTROL_WAIT_S = 0.1  # for calls that are being answered, before an actor is told to go
REVISION_TIMEOUT_S = 150.0
REVISION_POLL_S = 1.0
UNDEPLOY_TIMEOUT_S = 60.0
UNDEPLOY_POLL_S = 0.2  # Serve itself would look once a second


def start_ray(dashboard: bool, dashboard_port: int) -> str:
    """Start a Ray cluster on this host, or join the one that RAY_ADDRESS names; raises InvalidConfig.

    Returns where its dashboard is; empty where it is switched off.
    """
    if ray.is_initialized():
        return ""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = {
        "address": "local",
        "include_dashboard": dashboard,
        "dashboard_port": dashboard_port or None,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(
            log_to_driver=False, logging_level=logging.ERROR, **({} if joins_existing() else own)
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise InvalidConfig(
            reason="RAY_NOT_STARTED",
            message=f"Ray could not be started: {error}",
            remedy="Correct RAY_ADDRESS, or leave it out to start a Ray of its own.",
        ) from error
    signal.signal(signal.SIGTERM, at_sigterm)  # Ray has put a handler of its own there
    return context.dashboard_url or ""


def joins_existing() -> bool:
    """Whether the pools go to a Ray cluster that others have started."""
    return "RAY_ADDRESS" in os.environ


def deploy(place: Place) -> None:
    """Deploy all pools and return at once; `view` tells how far they are."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(proxy_location="Disabled", logging_config=logging_config)
    target = serve.RunTarget(
        target=application(place),
        name=APPLICATION,
        route_prefix=None,
        logging_config=logging_config,
        external_scaler_enabled=True,
    )
    serve.run_many([target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)


def application(place: Place) -> serve.Application:
    """The gateway with everything behind it, as one Serve application."""
    config = place.config
    resources = config.operations.coordinator_resources
    coordinator = pool(Coordinator, "coordinator", 1, resources).bind(place, RayWindow(APPLICATION))
    counts = {
        PrefillActor: (config.prefill.count, config.prefill.resources),
        DecodeActor: (config.decode.count, config.decode.resources),
        ShardActor: (config.experts.shards_count, config.experts.resources),
    }
    nodes = [
        pool(actor, actor.pool, *asked).bind(place, coordinator)
        for actor, asked in counts.items()
        if asked[0] > 0
    ]
    gateways = pool(GatewayActor, "gateway", config.gateway.count, config.gateway.resources)
    return gateways.bind(place, coordinator, *nodes)


def configured(args: dict[str, str]) -> serve.Application:
    """What a Serve config file builds by `import_path: cluster.pools:configured`, `args: {config: FILE}`.

    Raises InvalidConfig. A `revision` among the arguments, the SHA-256 of the file, has Serve build anew when
    the file has changed; a file that is mounted from elsewhere may change a minute after that is said.
    """
    path = Path(args["config"])
    wait_for_revision(path, args.get("revision"))
    return application(make_place(load_config(path), tempfile.mkdtemp(prefix="trivium-")))


def wait_for_revision(path: Path, revision: str | None, timeout_s: float = REVISION_TIMEOUT_S) -> None:
    """Return once a file has the SHA-256 that is awaited, if one is; raises InvalidConfig."""
    end_s = time.monotonic() + timeout_s
    while revision is not None and digest_of(path) != revision:
        if time.monotonic() > end_s:
            raise InvalidConfig(
                reason="OTHER_REVISION",
                message="the file is not the one that was announced",
                field=str(path),
                limit=f"SHA-256 {revision[:64]}, awaited for {timeout_s:.0f} s",
                remedy="Mount the file that the revision was made from, or leave the revision out.",
            )
        time.sleep(REVISION_POLL_S)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, empty where it cannot be read yet."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def pool(actor: Callable, name: str, count: int, resources: Mapping[str, float]) -> serve.Deployment:
    """A deployment of `count` actors of one class, each on a host that has the resources."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "resources": others,
    }
    if options["num_gpus"]:
        options["runtime_env"] = {"env_vars": gpu_settings(os.environ)}
    return serve.deployment(
        actor,
        name=name,
        num_replicas=count,
        max_ongoing_requests=CONTROL_CALLS_MAX,
        ray_actor_options=options,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=CONTROL_WAIT_S,
    )


def coordinator_handle() -> DeploymentHandle:
    """The coordinator, once Serve knows it."""
    return serve.get_deployment_handle("coordinator", APPLICATION)


def view(timeout_s: float = 5.0) -> View:
    """What the coordinator knows; an empty view while there is none."""
    return told_by("view", View(), timeout_s)


def pools_page(timeout_s: float = 5.0) -> str:
    """Where people look at pools and scale them; empty where there is no such page, or nobody to tell."""
    return told_by("pools_page", "", timeout_s)


def told_by(method: str, without: Any, timeout_s: float) -> Any:
    """What the coordinator answers to a call, or what to go by without it."""
    try:
        return getattr(coordinator_handle(), method).remote().result(timeout_s=timeout_s)
    except Exception:  # Serve has many names for "not yet"
        return without


def problems() -> list[str]:
    """What Serve says of deployments that cannot start."""
    application_status = serve.status().applications.get(APPLICATION)
    deployments = application_status.deployments if application_status else {}
    return [
        f"{name}: {status.message}"
        for name, status in deployments.items()
        if status.status.name in ("UNHEALTHY", "DEPLOY_FAILED")
    ]


def undeploy() -> None:
    """End the pools in good order and leave Ray running; raises TimeoutError."""
    serve.delete(APPLICATION, _blocking=False)
    end_s = time.monotonic() + UNDEPLOY_TIMEOUT_S
    while APPLICATION in serve.status().applications:
        if time.monotonic() > end_s:
            raise TimeoutError(f"the pools did not end within {UNDEPLOY_TIMEOUT_S:.0f} s")
        time.sleep(UNDEPLOY_POLL_S)


def stop(is_deployed: bool = True) -> None:
    """End the pools that were deployed here; a Ray cluster that was started here ends with them."""
    try:
        if is_deployed and joins_existing() and ray.is_initialized():
            undeploy()
    finally:
        ray.shutdown()
