"""A headless Chromium, driven over its DevTools socket."""

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,1000",
)
START_S, WAIT_S = 15.0, 8.0


def chromium() -> str | None:
    """Where the browser is; None on a machine without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._calls_count = 0
        self.problems: list[str] = []
        """Exceptions and refusals by the page's policy, as the browser's log has them."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        self._calls_count += 1
        await self._socket.send_json({"id": self._calls_count, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=WAIT_S)
            if message.get("id") == self._calls_count:
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.problems.append(message["params"]["entry"]["text"])

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression holds; raises TimeoutError with what the page shows then."""
        for _ in range(int(WAIT_S / 0.05)):
            if await self.evaluate(f"(() => {{ try {{ return Boolean({expression}) }} catch {{ }} }})()"):
                return
            await asyncio.sleep(0.05)
        text = await self.evaluate("document.body.innerText")
        raise TimeoutError(f"{expression} never held; the page shows:\n{text}")

    async def picture(self, path: Path, scheme: str) -> None:
        """Save what is seen as PNG, in the `light` or `dark` scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Page]:
    """A browser of its own with one page open."""
    with TemporaryDirectory(prefix="trivium-browser-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            chromium(),
            *FLAGS,
            f"--user-data-dir={folder}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with aiohttp.ClientSession() as session:
                address = await _page_address(session, Path(folder) / "DevToolsActivePort")
                async with session.ws_connect(address, max_msg_size=2**26) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await page.call(f"{domain}.enable")
                    await page.call("Page.navigate", url=url)
                    yield page
        finally:
            process.kill()
            await process.wait()


async def _page_address(session: aiohttp.ClientSession, port_file: Path) -> str:
    for _ in range(int(START_S / 0.05)):
        lines = port_file.read_text().splitlines() if port_file.exists() else []
        if len(lines) >= 2:
            async with session.get(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                pages = [one for one in await answer.json() if one["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        await asyncio.sleep(0.05)
    raise TimeoutError("the browser did not start")
