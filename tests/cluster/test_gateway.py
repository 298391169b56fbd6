"""The gateway as an actor, without Ray: health by what nodes say, drain, tokens, ports."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import gateway as gateway_module
from cluster.client import Client, Finished
from cluster.config import check_config
from cluster.errors import InvalidConfig, NodeUnavailable
from cluster.gateway import GatewayActor
from cluster.place import Place
from cluster.token_file import read_token
from cluster.tokenizer import Tokenizer
from cluster.validation import RequestedGeneration, RequestedSampling
from cluster.view import Member, View
from tests.cluster.served import FOLDER, SECRET, load_transformer, running_nodes, until, view_of

LONG = RequestedGeneration(
    text="The place", sampling=RequestedSampling(temperature=0.0, tokens_max=150, ignore_eos=True)
)


class Gateway(GatewayActor):
    """Ended by hand, as Serve does, and not again with the garbage."""

    drain = GatewayActor.__del__

    def __del__(self) -> None:
        """Nothing: see `drain`."""


class Coordinator:
    """Shows a view, unless it is gone."""

    def __init__(self, view: View):
        self.view: View | None = view
        self.heartbeat = self.leave = self

    async def remote(self, _: Member | str) -> View:
        """Answer whatever is asked."""
        if self.view is None:
            raise ConnectionError("gone")
        return self.view


@pytest.fixture(scope="module")
def transformer():
    """The example model."""
    return load_transformer()


@pytest.fixture
def nodes(transformer, tmp_path: Path) -> Iterator[dict]:
    """A prefill and a decode node of the example."""
    with running_nodes(transformer, tmp_path) as nodes:
        yield nodes


def starting(coordinator: Coordinator, **section) -> tuple[Gateway, asyncio.Task]:
    """A gateway on a free port, and its start, which ends once it serves."""
    values = {"model": {"folder": str(FOLDER)}, "gateway": {"port": 0, **section}}
    actor = Gateway.__new__(Gateway)
    place = Place(check_config(values, "test", Path.cwd()), SECRET, "")
    return actor, asyncio.create_task(actor.__init__(place, coordinator))


async def started(coordinator: Coordinator, **section) -> Gateway:
    """A gateway on a free port that serves."""
    actor, start = starting(coordinator, **section)
    await start
    return actor


async def events_of(client: Client, request: RequestedGeneration) -> list:
    """Every event of one request."""
    return [event async for event in client.generate(request, 60.0)]


async def serving(client: Client, wanted: bool) -> None:
    """Wait until health says so."""
    async with asyncio.timeout(10):
        while await client.is_serving() is not wanted:
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def nobody_to_notice(monkeypatch):
    """No waiting for balancers."""
    monkeypatch.setattr(gateway_module, "NOTICED_S", 0.0)


def test_health_follows_the_nodes_and_not_the_coordinator(nodes):
    async def run() -> None:
        coordinator = Coordinator(View())
        actor, start = starting(coordinator)
        await until(lambda: hasattr(actor, "heartbeat"))
        async with Client(actor.address) as client:
            await serving(client, False)
            assert not start.done(), "Serve would take it for ready, and an upgrade would move clients to it"
            coordinator.view = view_of(nodes)
            await start
            await serving(client, True)
            coordinator.view = None
            await until(lambda: not actor.heartbeat.is_answered)
            assert await client.is_serving()
            nodes["d"].close()
            await serving(client, False)
        await actor.drain()

    asyncio.run(run())


def test_one_that_never_served_can_be_ended():
    async def run() -> None:
        actor, start = starting(Coordinator(View()))
        await until(lambda: hasattr(actor, "heartbeat"))
        await actor.drain()
        await asyncio.wait_for(start, 1.0)

    asyncio.run(run())


def test_a_drain_finishes_what_runs_and_takes_nothing_new(nodes):
    async def run() -> None:
        actor = await started(Coordinator(view_of(nodes)))
        async with Client(actor.address) as client, Client(actor.address) as late:
            await serving(client, True)
            stream = client.generate(LONG)
            await anext(stream)
            draining = asyncio.create_task(actor.drain())
            await until(lambda: not actor.desk.can_serve or draining.done() or actor.state == "draining")
            async with asyncio.timeout(10):
                while True:
                    try:
                        await late.get_model()
                    except NodeUnavailable:
                        break
            last = [event async for event in stream][-1]
            assert isinstance(last, Finished)
            await draining
            assert actor.desk.requests_count == 0

    asyncio.run(run())


def test_a_drain_waits_for_a_request_that_is_still_validated(nodes, monkeypatch):
    monkeypatch.setattr(gateway_module, "GRACE_S", 0.0)
    encode, ended = Tokenizer.encode, threading.Event()
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **k: ended.wait(20) and encode(*a, **k))
    padded = replace(LONG, sampling=replace(LONG.sampling, stop_strings=("\u2205" * 1024,) * 2))

    async def run() -> None:
        actor = await started(Coordinator(view_of(nodes)))
        async with Client(actor.address) as client:
            await serving(client, True)
            events = asyncio.create_task(events_of(client, padded))
            await until(lambda: actor.desk.requests_count == 1)
            draining = asyncio.create_task(actor.drain())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(draining), 0.3)
            ended.set()
            assert isinstance((await events)[-1], Finished)
            await draining

    asyncio.run(run())


def test_a_taken_port_and_a_useless_token_are_named(tmp_path):
    empty = tmp_path / "token"
    empty.write_text("\n")

    async def run() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(InvalidConfig) as caught:
                await started(Coordinator(View()), port=taken.getsockname()[1])
            assert caught.value.field == "gateway.port"
        with pytest.raises(InvalidConfig) as caught:
            await started(Coordinator(View()), token_file=str(empty))
        assert caught.value.field == "gateway.token_file"

    asyncio.run(run())


def test_token_files(tmp_path):
    path = tmp_path / "token"
    path.write_text("secret\n")
    assert read_token(path, "f") == "secret"
    assert read_token(None, "f") is None
    for content in (b"", b"\xff\xfe", b"two\nlines", "gehe\u00edm".encode()):
        path.write_bytes(content)
        with pytest.raises(InvalidConfig) as caught:
            read_token(path, "f")
        assert caught.value.field == "f"
        assert "lines" not in str(caught.value)
    with pytest.raises(InvalidConfig):
        read_token(tmp_path / "missing", "f")
    assert "s3cret" not in repr(Place(None, "s3cret", ""))
