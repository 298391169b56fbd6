"""What the coordinator shows of the cluster: the Pools page, metrics, Ray's exporter, a line in the log."""

import asyncio
import logging
import time
from dataclasses import asdict
from typing import Any

from cluster.http_server import Application, LastingServer
from cluster.membership import Membership
from cluster.metrics import exposition, families, mirrored
from cluster.place import Place
from cluster.pools_page import pools_application
from cluster.scaler import Scaler
from cluster.stats_line import stats_line
from cluster.view import View

logger = logging.getLogger(__name__)

MIRROR_EVERY_S = 5.0
STATS_EVERY_S = 10.0
BY_PAGE = "the Pools page"


class Operations:
    """Serves and publishes until it is stopped; it decides nothing."""

    def __init__(self, place: Place, membership: Membership, scaler: Scaler, window: Any):
        """`window.publish` takes what Ray's exporter is to carry."""
        self._section = place.config.operations
        self._token = place.operations_token
        self._membership = membership
        self._scaler = scaler
        self._window = window
        self._server: LastingServer | None = None
        self._tasks: list[asyncio.Task] = []
        self._before, self._before_s = View(), time.monotonic()

    async def start(self) -> None:
        """Begin to serve and to publish, in the running event loop."""
        if self._section.enabled:
            where = (self._section.host, self._section.port, "operations.port")
            self._server = LastingServer(self._application, *where)
            await self._server.begin()
        regular = [(STATS_EVERY_S, self._log_stats)]
        if self._section.ray_metrics:
            regular.append((MIRROR_EVERY_S, self._mirror))
        self._tasks = [asyncio.create_task(self._every(*one)) for one in regular]

    async def stop(self) -> None:
        """Serve and publish no more."""
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop()

    @property
    def page(self) -> str:
        """Where people look at pools and scale them; empty until it is served, or if it never is.

        A token that was made at start is told behind `#`, which no server is sent; one from a file is not.
        """
        if self._server is None or not self._server.address:
            return ""
        address = self._server.address.replace("0.0.0.0", "127.0.0.1")
        return f"http://{address}/" + ("" if self._section.token_file else f"#token={self._token}")

    def _application(self) -> Application:
        return pools_application(self._token, self._read, self._act, self._metrics)

    async def _read(self) -> dict[str, Any]:
        return asdict(self._scaler.report())

    async def _act(self, kind: str, verb: str, count: int | None) -> None:
        """Do what a person asks on the page; raises TriviumError."""
        if verb == "release":
            self._scaler.release(kind)
        else:
            await self._scaler.set_count(kind, count if verb == "set" else None, BY_PAGE)

    async def _metrics(self, accept: str) -> tuple[bytes, str]:
        return exposition(self._families(), accept)

    def _families(self) -> list:
        now_s = time.monotonic()
        membership = self._membership
        view = membership.view(now_s)
        experts = membership.experts.report(membership.problem)
        silences_s = membership.silences_s(now_s)
        return families(view, experts, self._scaler.report(), silences_s, membership.lost_counts)

    def _mirror(self) -> None:
        self._window.publish(mirrored(self._families()))

    def _log_stats(self) -> None:
        view, now_s = self._membership.view(time.monotonic()), time.monotonic()
        logger.info("%s", stats_line(self._before, view, now_s - self._before_s))
        self._before, self._before_s = view, now_s

    async def _every(self, period_s: float, do: Any) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                do()
            except Exception:
                logger.exception("%s failed; it is tried again", do.__name__.strip("_"))
