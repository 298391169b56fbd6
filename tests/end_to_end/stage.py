"""One Ray for all end-to-end tests; a cluster that a test needs is put on it, and stays until the next."""

import asyncio
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from cluster import pools
from cluster.client import Admitted, Client, Delta, Finished
from cluster.config import ClusterConfig, check_config
from cluster.launch import is_complete
from cluster.place import Place
from cluster.validation import RequestedGeneration, RequestedSampling
from cluster.view import View

READY_S = 120.0
GREEDY_64 = RequestedSampling(temperature=0.0, tokens_max=64, ignore_eos=True)


class Stage:
    """Puts clusters on Ray, one at a time."""

    def __init__(self) -> None:
        pools.start_ray(dashboard=False, dashboard_port=0)
        self._config: ClusterConfig | None = None
        self._sockets: tempfile.TemporaryDirectory | None = None
        self.view = View()

    def cluster(self, folder: Path, **sections: dict) -> str:
        """Address of a cluster that serves `folder`, configured as a YAML file would."""
        values = {"model": {"folder": str(folder)}, "gateway": {"port": 0}, **sections}
        values["operations"] = {"port": 0, **values.get("operations", {})}
        config = check_config(values, "test", Path.cwd())
        if config != self._config:
            self.clear()
            self._sockets = tempfile.TemporaryDirectory(prefix="trivium-test-")
            pools.deploy(Place(config, secrets.token_hex(16), self._sockets.name))
            self._config = config
        self.view = self._ready_view(config)
        return self.view.of_kind("gateway")[0].address

    def clear(self) -> None:
        """Take the cluster off Ray."""
        if self._config is not None:
            pools.undeploy()
            self._sockets.cleanup()
            self._config = None

    @staticmethod
    def scale(pool: str, count: int) -> None:
        """Ask for another number of a pool's actors, as the Ray dashboard's server does."""
        controller = _get_global_client()._controller
        ray.get(controller.update_deployment_replicas.remote(DeploymentID(pool, pools.APPLICATION), count))

    def _ready_view(self, config: ClusterConfig) -> View:
        end_s = time.monotonic() + READY_S
        while time.monotonic() < end_s:
            view = pools.view()
            if is_complete(view, config):
                return view
            time.sleep(0.1)
        raise TimeoutError(f"the cluster is not ready: {pools.problems() or view}")


async def tokens_of(client: Client, request: RequestedGeneration) -> list[int]:
    """All tokens of one request."""
    tokens: list[int] = []
    async for event in client.generate(request, timeout_s=120):
        if isinstance(event, Delta):
            tokens.extend(event.token_ids)
    return tokens


def all_tokens(address: str, requests: Sequence[RequestedGeneration]) -> list[list[int]]:
    """Tokens of requests sent together."""

    async def together() -> list[list[int]]:
        async with Client(address) as client:
            return await asyncio.gather(*(tokens_of(client, request) for request in requests))

    return asyncio.run(together())


def one_by_one(address: str, requests: Sequence[RequestedGeneration]) -> list[list[int]]:
    """Tokens of requests sent one after the other."""
    return [all_tokens(address, [request])[0] for request in requests]


def events_of(address: str, request: RequestedGeneration) -> list[Admitted | Delta | Finished]:
    """Every event of one request."""

    async def events() -> list[Admitted | Delta | Finished]:
        async with Client(address) as client:
            return [event async for event in client.generate(request, timeout_s=120)]

    return asyncio.run(events())


def cluster_of(address: str):
    """What a gateway tells of its cluster."""

    async def ask():
        async with Client(address) as client:
            return await client.get_cluster()

    return asyncio.run(ask())


def wait_until(true: Callable[[], bool], timeout_s: float) -> bool:
    """Whether something came true in time."""
    end_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True
