"""The Pools page's server by its answers, and the page itself in a real browser."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from cluster.autoscaler import Autoscaler
from cluster.errors import NodeUnavailable
from cluster.pools_page import PAGE, is_trusted_host, pools_application
from cluster.scaling import AutoscalerConfig, PoolLimits, PoolReading
from tests.cluster.browser import chromium, opened

TOKEN = "a-token-for-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = (
    PoolLimits("gateway", 1, 1, 1024),
    PoolLimits("prefill", 2, 1, 8),
    PoolLimits("decode", 3, 1, 8),
    PoolLimits("experts", 4, 2, 16),
)


class House:
    """A real autoscaler behind the page, and a Serve that obeys at once."""

    def __init__(self) -> None:
        self.autoscaler = Autoscaler(AutoscalerConfig(LIMITS))
        self.targets = {limits.kind: limits.count for limits in LIMITS}
        self.now_s = 0.0
        self.pages_share = 0.55
        self.look()

    def look(self) -> None:
        gateway, prefill, decode, experts = (self.targets[limits.kind] for limits in LIMITS)
        at_s = self.now_s
        prompts = {"requests_count": 9, "tokens_waiting_count": 1400, "tokens_per_s": 1400.0}
        prompts |= {"busy_share": 0.66, "time_to_first_token_s": 0.9}
        leased_count = int(500 * decode * self.pages_share)
        pages = {"pages_total_count": 500 * decode, "pages_leased_count": leased_count}
        pages |= {"requests_count": 60, "requests_max_count": 64 * decode}
        readings = [
            PoolReading("gateway", at_s, gateway, gateway),
            PoolReading("prefill", at_s, prefill, prefill, **prompts),
            PoolReading("decode", at_s, decode, decode, **pages),
            PoolReading("experts", at_s, experts, experts - 1, 1, busy_share=0.4, slowness=1.12),
        ]
        for command in self.autoscaler.decide(readings, at_s):
            self.targets[command.kind] = command.count

    async def read(self) -> Any:
        self.now_s += 0.7
        self.look()
        return asdict(self.autoscaler.report(self.now_s))

    async def act(self, kind: str, verb: str, count: int | None) -> None:
        if kind == "experts" and verb == "set":
            raise NodeUnavailable("RAY_DASHBOARD_SILENT", "the server is silent", remedy="Start it.")
        if kind == "experts":
            raise KeyError("a fault with /a/path in it")
        if verb == "release":
            self.autoscaler.release(kind, self.now_s)
        else:
            self.targets[kind] = self.autoscaler.hold(kind, count, "the Pools page", self.now_s)

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        return f"trivium_up 1  # for {accept}\n".encode(), "text/plain; version=0.0.4; charset=utf-8"


@asynccontextmanager
async def served() -> AsyncIterator[tuple[TestClient, House]]:
    house = House()
    app = pools_application(TOKEN, house.read, house.act, house.metrics)
    async with TestClient(TestServer(app)) as client:
        yield client, house


def asked(
    method: str, path: str, headers: dict[str, str] | None = None, **arguments: Any
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one answer."""

    async def ask() -> tuple[int, dict[str, str], str]:
        async with (
            served() as (client, _),
            client.request(method, path, headers=headers, **arguments) as answer,
        ):
            return answer.status, dict(answer.headers), await answer.text()

    return asyncio.run(ask())


def told(text: str) -> dict[str, str]:
    body = json.loads(text)
    assert set(body) == {"reason", "message", "field", "limit", "remedy"}
    assert "Traceback" not in text and "/a/path" not in text
    return body


# who may come in


def test_what_is_open_needs_no_token():
    for path, word in (("/", "<!doctype html>"), ("/healthz", "ok"), ("/metrics", "trivium_up 1")):
        status, _, text = asked("GET", path)
        assert status == 200 and word in text


WRONG = [{}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}x"}]
WRONG += [{"Authorization": "Bearer \xfc"}, {"Authorization": f"Basic {TOKEN}"}]


@pytest.mark.parametrize("headers", WRONG)
@pytest.mark.parametrize(("method", "path"), [("GET", "/api/pools"), ("POST", "/api/pools/decode")])
def test_without_the_token_nothing_is_told_or_done(method: str, path: str, headers: dict[str, str]):
    status, answered, text = asked(method, path, headers)
    assert status == 401 and answered["WWW-Authenticate"] == "Bearer"
    assert told(text)["reason"] in ("NO_TOKEN", "WRONG_TOKEN") and TOKEN not in text


def test_a_token_in_the_address_is_no_token():
    assert asked("GET", f"/api/pools?token={TOKEN}")[0] == 401


@pytest.mark.parametrize("path", ["/", "/api/pools", "/metrics", "/nowhere"])
def test_every_answer_is_protected(path: str):
    _, headers, _ = asked("GET", path, BEARER)
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Server"] == "trivium"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_another_sites_page_changes_nothing():
    for origin in ("http://evil.example", "null", "http://[", "https://127.0.0.1"):
        headers = BEARER | {"Origin": origin}
        status, _, text = asked("POST", "/api/pools/decode", headers, json={"verb": "set", "count": 4})
        assert status == 400 and told(text)["field"] == "Origin"


def test_a_form_cannot_change_pools():
    headers = BEARER | {"Content-Type": "text/plain"}
    status, _, text = asked("POST", "/api/pools/decode", headers, data='{"verb": "release"}')
    assert status == 400 and told(text)["field"] == "Content-Type"


def test_a_name_that_others_own_does_not_lead_to_metrics():
    assert asked("GET", "/metrics", {"Host": "evil.example"})[0] == 400
    assert asked("GET", "/metrics", {"Host": "evil.example"} | BEARER)[0] == 200
    assert asked("GET", "/", {"Host": "evil.example"})[0] == 200


@pytest.mark.parametrize(
    ("host", "is_trusted"),
    [
        ("127.0.0.1:8266", True),
        ("[::1]:8266", True),
        ("localhost:8266", True),
        ("trivium-head-svc", True),
        ("trivium.default.svc.cluster.local:8266", True),
        ("evil.example", False),
        ("localhost.evil.example:8266", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_which_names_are_trusted(host: str, is_trusted: bool):
    assert is_trusted_host(host) is is_trusted


# what is asked and answered


def test_a_person_sets_holds_and_releases():
    async def story() -> None:
        async with served() as (client, house):

            async def say(kind: str, **body: object) -> dict[str, Any]:
                async with client.post(f"/api/pools/{kind}", json=body, headers=BEARER) as answer:
                    assert answer.status == 200
                    return next(one for one in (await answer.json())["pools"] if one["kind"] == kind)

            assert (await say("decode", verb="set", count=5))["hold"]["count"] == 5
            assert house.targets["decode"] == 5
            assert (await say("decode", verb="release"))["hold"] is None
            assert (await say("gateway", verb="hold"))["hold"]["by"] == "the Pools page"
            async with client.get("/api/pools", headers=BEARER) as answer:
                report = await answer.json()
            assert report["decisions"][0]["reason"].startswith("set by the Pools page")
            assert report["is_enabled"] is True

    asyncio.run(story())


BAD_BODIES = [
    (b"", "body"),
    (b"{", "body"),
    (b"[" * 1000, "body"),
    (b"[]", "body"),
    (b'{"count": 3}', "body"),
    (b'{"verb": 3}', "body"),
    (b'{"verb": "explode"}', "verb"),
    (b'{"verb": "set"}', "count"),
    (b'{"verb": "set", "count": "3"}', "count"),
    (b'{"verb": "set", "count": true}', "count"),
    (b'{"verb": "set", "count": 2.5}', "count"),
    (b'{"verb": "set", "count": 0}', "count"),
    (b'{"verb": "set", "count": 1025}', "count"),
    (b'{"verb": "release", "count": 1}', "count"),
    (b'{"verb": "hold", "by": "me"}', "body"),
    (b"\xff\xfe", "body"),
]


@pytest.mark.parametrize(("body", "field"), BAD_BODIES)
def test_a_bad_body_is_refused_with_the_reason(body: bytes, field: str):
    headers = BEARER | {"Content-Type": "application/json"}
    status, _, text = asked("POST", "/api/pools/decode", headers, data=body)
    assert status == 400 and told(text)["field"] == field and told(text)["remedy"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/pools/nobody", {"verb": "release"}, 400),
        ("POST", "/api/pools/experts", {"verb": "set", "count": 3}, 503),
        ("POST", "/api/pools/decode", {"verb": "x" * 5000}, 413),
        ("GET", "/api/pools/decode", None, 405),
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/metrics", None, 405),
    ],
)
def test_other_errors_are_typed_too(method: str, path: str, body: dict | None, status: int):
    answered, _, text = asked(method, path, BEARER, json=body)
    assert answered == status
    assert told(text)["reason"].isupper()


def test_a_fault_of_ours_tells_only_its_id(caplog: pytest.LogCaptureFixture):
    status, _, text = asked("POST", "/api/pools/experts", BEARER, json={"verb": "hold"})
    error_id = re.search(r"error id (\w+)", told(text)["message"])[1]
    assert status == 500 and error_id in caplog.text and "/a/path" in caplog.text


# the page


def test_the_page_brings_all_that_it_needs():
    page = PAGE.read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "style=",
        "onclick",
    ):
        assert word not in page
    assert len(re.findall("<script", page)) == len(re.findall("<style", page)) == 1


needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")


@needs_browser
def test_the_page_lives_in_a_browser(tmp_path: Path):
    asyncio.run(visit(tmp_path))


def of(kind: str, what: str) -> str:
    return f"document.querySelector('[data-kind={kind}] {what}')"


async def visit(folder: Path) -> None:
    async with served() as (client, house):
        address = str(client.make_url("/"))
        async with opened(address) as page:
            await page.until("!document.getElementById('entrance').hidden")
            assert await page.evaluate("document.activeElement.id") == "token"
            await enter(page, "wrong")
            await page.until("document.getElementById('asked').textContent.includes('not the token')")
            assert page.problems and all("401" in problem for problem in page.problems)
            page.problems.clear()
            await enter(page, TOKEN)
            await page.until("document.querySelectorAll('.card').length === 4")
            await page.until("document.getElementById('contact').textContent === 'live'")
            assert await page.evaluate("location.href") == address
            await set_hold_and_release(page, house)
            await see_what_moves(page, house)
            await see_errors_and_silence(page, client)
            for scheme in ("light", "dark"):
                await page.picture(folder / f"{scheme}.png", scheme)
                assert (folder / f"{scheme}.png").stat().st_size > 10_000


async def enter(page: Any, token: str) -> None:
    await page.evaluate(f"document.getElementById('token').value = {token!r}")
    await page.evaluate("document.querySelector('#entrance button').click()")


async def set_hold_and_release(page: Any, house: House) -> None:
    await page.evaluate(of("decode", "[data-act=plus]") + ".focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):  # by keyboard
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        await page.call("Input.dispatchKeyEvent", type=kind, **key)
    await page.until(of("decode", ".badge") + ".textContent.startsWith('held at 4 by the Pools page')")
    assert house.targets["decode"] == 4
    assert await page.evaluate("document.activeElement.dataset.act") == "plus"
    await page.evaluate(of("decode", "[data-act=minus]") + ".click()")
    await page.until(of("decode", ".big") + ".textContent === '3 of 3'")
    await page.evaluate(of("decode", "[data-act=release]") + ".click()")
    await page.until(of("decode", ".badge") + ".hidden")
    assert await page.evaluate(of("decode", "[data-act=release]") + ".disabled")
    await page.evaluate(of("gateway", "[data-act=hold]") + ".click()")
    await page.until("!" + of("gateway", ".badge") + ".hidden")


async def see_what_moves(page: Any, house: House) -> None:
    house.pages_share = 0.95
    await page.until(of("decode", ".fill.hot"))
    await page.until(of("decode", ".big") + ".textContent === '4 of 4'")
    await page.until("document.getElementById('decisions').innerText.includes('above 80 %')")
    assert await page.evaluate(of("decode", "[role=meter]") + ".getAttribute('aria-label')") == "pages"
    await page.until(of("prefill", ".history .count") + ".getAttribute('d').includes('H')")


async def see_errors_and_silence(page: Any, client: TestClient) -> None:
    assert page.problems == []
    await page.evaluate(of("experts", "[data-act=plus]") + ".click()")
    await page.until("document.getElementById('message').textContent.includes('the server is silent')")
    await client.server.close()
    await page.until("document.getElementById('contact').className === 'lost'")
    assert "lost contact" in await page.evaluate("document.getElementById('contact').textContent")


@needs_browser
def test_a_link_hands_the_token_over_and_leaves_no_trace():
    async def visit_by_link() -> None:
        async with served() as (client, _):
            address = str(client.make_url("/"))
            async with opened(f"{address}#token={TOKEN}") as page:
                await page.until("document.querySelectorAll('.card').length === 4")
                assert await page.evaluate("location.href") == address
                assert await page.evaluate("history.length") <= 2
                assert page.problems == []

    asyncio.run(visit_by_link())
