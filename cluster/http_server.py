"""An HTTP server in the running event loop, and what a gateway's monitors read there."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from cluster.errors import InvalidConfig

logger = logging.getLogger(__name__)

SHUTDOWN_S = 2.0
TRY_EVERY_S = 3.0

Application = web.Application
Metrics = Callable[[str], Awaitable[tuple[bytes, str]]]
"""From an Accept header to a text and its content type."""


class HttpServer:
    """Serves one application at one address until it is stopped."""

    def __init__(self, runner: web.AppRunner, address: str):
        self.address = address
        self._runner = runner

    @classmethod
    async def started(cls, application: web.Application, host: str, port: int, field: str) -> "HttpServer":
        """Listen; raises InvalidConfig, about the key `field`, where that is not possible."""
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, reuse_port=False).start()
        except OSError as error:
            await runner.cleanup()
            raise InvalidConfig(
                reason="PORT_TAKEN",
                message=f"{host}:{port} cannot be listened on",
                field=field,
                remedy="Name a free port, or 0 for any.",
            ) from error
        return cls(runner, f"{host}:{runner.addresses[0][1]}")

    async def stop(self) -> None:
        """Answer nobody any more."""
        await self._runner.cleanup()


class LastingServer:
    """Serves as soon as its port is free: what people look at is no reason to end what they look at."""

    def __init__(self, make: Callable[[], web.Application], host: str, port: int, field: str):
        self._make = make
        self._where = (host, port, field)
        self._server: HttpServer | None = None
        self._trying: asyncio.Task | None = None

    @property
    def address(self) -> str:
        """Where it serves; empty while it does not."""
        return self._server.address if self._server is not None else ""

    async def begin(self) -> None:
        """Serve, now or later."""
        if not await self._begun():
            self._trying = asyncio.create_task(self._try_on())

    async def stop(self) -> None:
        """Serve no more, nor try to."""
        if self._trying is not None:
            self._trying.cancel()
        if self._server is not None:
            await self._server.stop()

    async def _begun(self) -> bool:
        try:
            self._server = await HttpServer.started(self._make(), *self._where)
        except InvalidConfig as error:
            if self._trying is None:
                logger.warning("%s It is tried again every %.0f s.", error, TRY_EVERY_S)
        return self._server is not None

    async def _try_on(self) -> None:
        while not await self._begun():
            await asyncio.sleep(TRY_EVERY_S)


def metrics_application(metrics: Metrics, is_serving: Callable[[], bool]) -> web.Application:
    """Metrics, and for probes that speak no gRPC whether a request would be served: 200 or 503."""

    async def answer(request: web.Request) -> web.Response:
        text, content_type = await metrics(request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type})

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if is_serving() else web.Response(text="not serving\n", status=503)

    application = web.Application()
    application.router.add_get("/metrics", answer)
    application.router.add_get("/healthz", health)
    return application
