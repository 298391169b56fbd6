"""The pools as Ray Serve deployments: the only file that knows Ray.

Serve starts, checks, restarts, drains and updates the actors, and its dashboard shows and scales them; no
token and no tensor ever goes through it.
"""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from cluster.actors import DRAIN_S, DecodeActor, PrefillActor, ShardActor
from cluster.coordinator import Coordinator
from cluster.errors import InvalidConfig
from cluster.gateway import GatewayActor
from cluster.membership import View
from cluster.place import Place

APPLICATION = "trivium"
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
OBJECT_STORE_BYTES = 128 << 20
CONTROL_CALLS_MAX = 1000


@dataclass(frozen=True)
class RayAddresses:
    """Where Ray's own services are; `dashboard` is empty where it is switched off."""

    dashboard: str


def start_ray(dashboard: bool, dashboard_port: int) -> RayAddresses:
    """Start a Ray cluster on this host, or join the one that RAY_ADDRESS names; raises InvalidConfig."""
    if ray.is_initialized():
        return RayAddresses("")
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
    return RayAddresses(context.dashboard_url or "")


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
    coordinator = pool(Coordinator, "coordinator", 1).bind(place)
    nodes = [
        pool(PrefillActor, "prefill", config.prefill.count).bind(place, coordinator),
        pool(DecodeActor, "decode", config.decode.count).bind(place, coordinator),
        pool(ShardActor, "experts", config.experts.shards_count).bind(place, coordinator),
    ]
    return pool(GatewayActor, "gateway", config.gateway.count).bind(place, coordinator, *nodes)


def pool(actor: Callable, name: str, count: int) -> serve.Deployment:
    """A deployment of `count` actors of one class."""
    return serve.deployment(
        actor,
        name=name,
        num_replicas=count,
        max_ongoing_requests=CONTROL_CALLS_MAX,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )


def coordinator_handle() -> DeploymentHandle:
    """The coordinator, once Serve knows it."""
    return serve.get_deployment_handle("coordinator", APPLICATION)


def view(timeout_s: float = 5.0) -> View:
    """What the coordinator knows; an empty view while there is none."""
    try:
        return coordinator_handle().view.remote().result(timeout_s=timeout_s)
    except Exception:  # Serve has many names for "not yet"
        return View()


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
    """End the pools in good order and leave Ray running."""
    serve.delete(APPLICATION)


def stop(is_deployed: bool = True) -> None:
    """End the pools that were deployed here; a Ray cluster that was started here ends with them."""
    try:
        if is_deployed and joins_existing() and ray.is_initialized():
            undeploy()
    finally:
        ray.shutdown()
