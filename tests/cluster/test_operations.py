"""The coordinator's page, metrics, exporter and stats line, over real HTTP and a Ray that obeys."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from cluster import http_server
from cluster import operations as operations_module
from cluster.config import check_config
from cluster.membership import Membership
from cluster.operations import BY_PAGE, Operations
from cluster.place import Place
from cluster.scaler import Scaler
from experts.config import PlanConfig
from experts.plan import Planner
from experts.rebalance import RebalanceConfig
from kernels.model.config import ModelConfig
from tests.cluster import told
from tests.cluster.ray_server import RayServer, Window, ray_server
from tests.cluster.served import until

FOLDER = Path("examples/trivium-small")
TOKEN = "a-token-for-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
TARGETS = {"gateway": 1, "prefill": 1, "decode": 2, "experts": 1}


class House:
    """A membership that has heard of one of each, and what is shown of it."""

    def __init__(self, ray: RayServer, window: Window, **section: object):
        values = {"model": {"folder": str(FOLDER)}, "operations": {"port": 0} | section}
        config, model = check_config(values, "test", Path.cwd()), ModelConfig.from_folder(FOLDER)
        planner = Planner.of_model(model, PlanConfig())
        self.membership = Membership(model, 1, planner, RebalanceConfig(), expert_bytes=1)
        self.scaler = Scaler(config, self.membership, window, (1, 16))
        self.operations = Operations(Place(config, "secret", "", TOKEN), self.membership, self.scaler, window)
        self.ray, self.window = ray, window

    def beat(self, scale: int = 1) -> None:
        """One of each tells how it is, now."""
        for member in told.view(scale).members:
            there = replace(member, address=f"memory://{member.name}")
            self.membership.heartbeat(there, operations_module.time.monotonic())

    @property
    def address(self) -> str:
        """Where the page is."""
        return self.operations.page.partition("/#")[0]


@asynccontextmanager
async def house(**section: object) -> AsyncIterator[House]:
    """One that serves, stopped at the end."""
    async with ray_server(**TARGETS) as (ray, access):
        made = House(ray, Window(access), **section)
        made.beat()
        await made.operations.start()
        try:
            yield made
        finally:
            await made.operations.stop()


async def read(url: str, method: str = "GET", **arguments: object) -> tuple[int, str, str]:
    """Status, content type and text."""
    async with aiohttp.ClientSession() as session, session.request(method, url, **arguments) as answer:
        return answer.status, answer.headers.get("Content-Type", ""), await answer.text()


@pytest.fixture
def hurried(monkeypatch) -> None:
    """No waiting between one line or export and the next."""
    monkeypatch.setattr(operations_module, "MIRROR_EVERY_S", 0.01)
    monkeypatch.setattr(operations_module, "STATS_EVERY_S", 0.01)


@pytest.fixture
def heard() -> Iterator[list[logging.LogRecord]]:
    """What is written to the log."""
    records: list[logging.LogRecord] = []
    logger, handler = operations_module.logger, logging.Handler()
    handler.emit = records.append
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_the_page_is_where_it_says_and_its_token_opens_it():
    async def run() -> None:
        async with house() as one:
            assert one.operations.page.endswith(f"/#token={TOKEN}")
            status, _, text = await read(f"{one.address}/")
            assert status == 200 and "<!doctype html>" in text and TOKEN not in text
            assert (await read(f"{one.address}/api/pools"))[0] == 401
            await one.scaler.look()
            status, _, text = await read(f"{one.address}/api/pools", headers=BEARER)
            assert status == 200 and '"kind": "decode"' in text and '"target_count": 2' in text

    asyncio.run(run())


def test_what_people_do_on_the_page_reaches_ray():
    async def run() -> None:
        async with house() as one:
            await one.scaler.look()
            path = f"{one.address}/api/pools/decode"

            async def say(**body: object) -> int:
                return (await read(path, "POST", headers=BEARER, json=body))[0]

            def hold():
                return next(pool.hold for pool in one.scaler.report().pools if pool.kind == "decode")

            assert await say(verb="set", count=4) == 200
            assert one.ray.asked == [("decode", 4)] and (hold().count, hold().by) == (4, BY_PAGE)
            assert await say(verb="release") == 200 and hold() is None
            assert await say(verb="hold") == 200 and hold().count == 4
            assert await say(verb="set", count=0) == 400 and hold().count == 4
            one.window.access = None
            assert await say(verb="set", count=5) == 503 and hold().count == 4

    asyncio.run(run())


def test_metrics_come_in_both_forms():
    async def run() -> None:
        async with house() as one:
            await one.scaler.look()
            status, content_type, text = await read(f"{one.address}/metrics")
            assert status == 200 and content_type.startswith("text/plain; version=0.0.4")
            classic = {family.name for family in parse_classic(text)}
            accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
            status, content_type, text = await read(f"{one.address}/metrics", headers=accept)
            assert status == 200 and content_type.startswith("application/openmetrics-text")
            assert text.endswith("# EOF\n")
            families = {family.name for family in parse_openmetrics(text)}
            assert {name.removesuffix("_total") for name in classic} == families
            for part in ("requests", "pages", "pool", "experts"):
                assert any(part in name for name in families), f"nothing of {part}"

    asyncio.run(run())


def test_rays_exporter_gets_the_same(hurried):
    async def run() -> None:
        async with house() as one:
            await until(lambda: len(one.window.published) >= 3)
            samples = one.window.published[-1]
            names = {name for name, *_ in samples}
            page = (await read(f"{one.address}/metrics"))[2]
            assert names and all(f"\n{name}" in page for name in names)
            assert all(isinstance(value, float | int) for *_, value in samples)

    asyncio.run(run())


def test_an_exporter_that_fails_is_told_of_and_tried_again(hurried, heard):
    async def run() -> None:
        async with ray_server(**TARGETS) as (ray, access):
            window = Window(access)
            publish, faults = window.publish, [ZeroDivisionError()]

            def faulty(samples) -> None:
                if faults:
                    raise faults.pop()
                publish(samples)

            window.publish = faulty
            one = House(ray, window)
            await one.operations.start()
            await until(lambda: len(window.published) >= 2)
            await one.operations.stop()
            told_of = [record for record in heard if record.exc_info]
            assert [record.getMessage() for record in told_of] == ["mirror failed; it is tried again"]

    asyncio.run(run())


def test_a_line_says_what_was_done_since_the_last_one(hurried, heard):
    def lines() -> list[str]:
        return [record.getMessage() for record in heard]

    async def run() -> None:
        async with house(ray_metrics=False) as one:
            await until(lambda: len(heard) >= 2)
            assert lines()[-1].startswith("1 gateway, 1 prefill, 2 decode, 1 experts; requests 4 running")
            assert "finished/s" not in lines()[-1] and "tokens/s" not in lines()[-1]
            one.beat(scale=2)
            await until(lambda: any("finished/s" in line for line in lines()))
            count = len(heard)
            await until(lambda: len(heard) > count)
            assert "finished/s" not in lines()[-1], "what was told is not told again"
            assert one.window.published == []

    asyncio.run(run())


def test_stopped_it_leaves_nothing_running(hurried):
    async def run() -> None:
        async with ray_server(**TARGETS) as (ray, access):
            one = House(ray, Window(access))
            before = asyncio.all_tasks()
            await one.operations.start()
            assert len(asyncio.all_tasks() - before) >= 2
            address = one.address
            await one.operations.stop()
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == before
            count = len(one.window.published)
            with pytest.raises(aiohttp.ClientConnectorError):
                await read(f"{address}/healthz")
            assert len(one.window.published) == count

    asyncio.run(run())


def test_switched_off_there_is_no_page_but_a_line_and_rays_exporter(hurried, heard):
    async def run() -> None:
        async with house(enabled=False) as one:
            assert one.operations.page == ""
            await until(lambda: one.window.published and heard)

    asyncio.run(run())


def test_a_taken_port_ends_nothing_and_is_served_once_it_is_free(hurried, monkeypatch):
    monkeypatch.setattr(http_server, "TRY_EVERY_S", 0.02)

    async def run() -> None:
        taken = socket.create_server(("127.0.0.1", 0))
        async with house(port=taken.getsockname()[1]) as one:
            assert one.operations.page == ""
            await until(lambda: one.window.published)
            taken.close()
            await until(lambda: one.operations.page)
            assert (await read(f"{one.address}/healthz"))[0] == 200

    asyncio.run(run())


def test_stopped_while_its_port_is_taken_it_tries_no_more(monkeypatch):
    monkeypatch.setattr(http_server, "TRY_EVERY_S", 0.02)

    async def run() -> None:
        before = asyncio.all_tasks()
        with socket.create_server(("127.0.0.1", 0)) as taken:
            async with house(port=taken.getsockname()[1]) as one:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        assert one.operations.page == "" and asyncio.all_tasks() == before

    asyncio.run(run())
