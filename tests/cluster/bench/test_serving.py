"""A cluster in a process of its own, played by one that only says that it serves."""

import asyncio
import signal
import sys

import pytest

from cluster.bench import serving
from cluster.bench.serving import Target, free_port, running
from cluster.client import Client
from cluster.errors import InvalidConfig, NodeUnavailable

SERVER = """
import signal, sys, grpc
from concurrent.futures import ThreadPoolExecutor
from grpc_health.v1 import health, health_pb2_grpc
port, ignores = sys.argv[1:]
server = grpc.server(ThreadPoolExecutor(2))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
server.add_insecure_port("127.0.0.1:" + port)
for number in (signal.SIGINT, signal.SIGTERM):
    if ignores == "no":
        signal.signal(number, lambda *_: server.stop(0))
    else:
        signal.signal(number, signal.SIG_IGN)
server.start()
server.wait_for_termination()
"""


async def served_once(ignores: str) -> tuple[bool, bool]:
    """Whether it served within the block, and after it."""
    target = Target(f"127.0.0.1:{await free_port('127.0.0.1')}", None)
    command = (sys.executable, "-c", SERVER, target.address.rpartition(":")[2], ignores)
    async with running(command, target), Client(target.address) as client:
        within = await client.is_serving()
    async with Client(target.address) as client:
        return within, await client.is_serving()


def test_it_serves_for_as_long_as_the_block_lasts():
    assert asyncio.run(served_once("no")) == (True, False)


def test_it_ends_even_if_it_does_not_want_to(monkeypatch):
    monkeypatch.setattr(serving, "STOP_S", ((signal.SIGINT, 0.1), (signal.SIGTERM, 0.1)))
    assert asyncio.run(served_once("yes")) == (True, False)


def test_one_that_ends_at_once_is_told_with_its_last_words():
    async def work():
        command = (sys.executable, "-c", "print('x' * 9000); print('no such model'); raise SystemExit(1)")
        async with running(command, Target("127.0.0.1:1", None)):
            pytest.fail("it does not serve")

    with pytest.raises(NodeUnavailable, match="no such model") as raised:
        asyncio.run(work())
    assert len(str(raised.value)) < 3000


def test_one_that_never_serves_is_given_up(monkeypatch):
    monkeypatch.setattr(serving, "READY_TIMEOUT_S", 0.3)

    async def work():
        async with running((sys.executable, "-c", "input()"), Target("127.0.0.1:1", None)):
            pytest.fail("it does not serve")

    with pytest.raises(NodeUnavailable, match="did not start"):
        asyncio.run(work())


def test_it_is_started_by_the_command_line_on_a_free_port(monkeypatch):
    commands = []

    class Started:
        def __init__(self, command, target):
            commands.append((command, target))

        async def __aenter__(self):
            pass

        async def __aexit__(self, *_):
            pass

    monkeypatch.setattr(serving, "running", Started)

    async def work(config):
        async with serving.serving(config) as target:
            return target

    path = serving.Path("examples/local.yaml")
    target = asyncio.run(work(path))
    [(command, given)] = commands
    port = target.address.removeprefix("127.0.0.1:")
    assert given == target
    assert command[1:] == ("-m", "cluster.cli", "serve", "examples/local.yaml", "--port", port)
    with pytest.raises(InvalidConfig):
        asyncio.run(work(serving.Path("missing.yaml")))
