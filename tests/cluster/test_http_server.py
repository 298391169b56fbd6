"""A server that listens, says so, refuses a port that is taken, and ends."""

import asyncio
from collections.abc import Callable

import aiohttp
import pytest
from aiohttp import web

from cluster import http_server
from cluster.errors import InvalidConfig
from cluster.http_server import HttpServer, metrics_application

HOST = "127.0.0.1"


async def metrics(accept: str) -> tuple[bytes, str]:
    """Says what was asked for."""
    return f"a 1 # {accept}\n".encode(), "text/plain; version=0.0.4; charset=utf-8"


def application(is_serving: Callable[[], bool] = lambda: True) -> web.Application:
    """What a gateway's monitors read."""
    return metrics_application(metrics, is_serving)


def test_metrics_are_served_at_the_port_that_it_tells():
    async def run() -> None:
        server = await HttpServer.started(application(), HOST, 0, "gateway.metrics_port")
        url = f"http://{server.address}/metrics"
        async with aiohttp.ClientSession() as session:
            async with session.get(url, headers={"Accept": "of my own"}) as answer:
                assert await answer.text() == "a 1 # of my own\n"
                assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            async with session.get(f"http://{server.address}/") as answer:
                assert answer.status == 404
            async with session.post(url) as answer:
                assert answer.status == 405
            await server.stop()
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get(url)

    asyncio.run(run())


def test_a_taken_port_is_told_with_its_key():
    async def run() -> None:
        server = await HttpServer.started(application(), HOST, 0, "operations.port")
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(InvalidConfig) as caught:
            await HttpServer.started(application(), HOST, port, "operations.port")
        assert (caught.value.reason, caught.value.field) == ("PORT_TAKEN", "operations.port")
        assert str(port) in caught.value.message and "0 for any" in caught.value.remedy
        await server.stop()
        again = await HttpServer.started(application(), HOST, port, "operations.port")
        await again.stop()

    asyncio.run(run())


def test_an_address_that_is_not_here_is_told_too():
    async def run() -> None:
        with pytest.raises(InvalidConfig, match="cannot be listened on"):
            await HttpServer.started(application(), "192.0.2.1", 0, "operations.port")

    asyncio.run(run())


def test_probes_hear_whether_a_request_would_be_served():
    async def run() -> None:
        serving = [True]
        server = await HttpServer.started(application(lambda: serving[0]), HOST, 0, "gateway.metrics_port")
        async with aiohttp.ClientSession() as session:
            for is_serving, status in ((True, 200), (False, 503), (True, 200)):
                serving[0] = is_serving
                async with session.get(f"http://{server.address}/healthz") as answer:
                    assert answer.status == status
        await server.stop()

    asyncio.run(run())


def test_a_server_that_lasts_begins_when_its_port_is_free(monkeypatch):
    monkeypatch.setattr(http_server, "TRY_EVERY_S", 0.02)

    async def run() -> None:
        first = await HttpServer.started(application(), HOST, 0, "operations.port")
        port = int(first.address.rpartition(":")[2])
        second = http_server.LastingServer(application, HOST, port, "operations.port")
        await second.begin()
        assert second.address == ""
        await first.stop()
        async with asyncio.timeout(5):
            while not second.address:
                await asyncio.sleep(0.01)
        url = f"http://{second.address}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200
        await second.stop()
        third = http_server.LastingServer(application, HOST, port, "operations.port")
        await third.begin()
        assert third.address == f"{HOST}:{port}"
        await third.stop()

    asyncio.run(run())
