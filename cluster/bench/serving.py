"""A cluster for as long as a block lasts: `trivium serve` in a process of its own."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.client import Client
from cluster.config import load_config
from cluster.errors import NodeUnavailable
from cluster.token_file import read_token

READY_TIMEOUT_S = 600.0
POLL_S = 0.25
STOP_S = ((signal.SIGINT, 60.0), (signal.SIGTERM, 30.0))  # patience with each, before the process is killed
LOG_BYTES_TOLD = 2000
ANY_HOSTS = ("0.0.0.0", "::", "auto")


@dataclass(frozen=True)
class Target:
    """Where a cluster answers, and the token it asks for."""

    address: str
    token: str | None


@asynccontextmanager
async def serving(config_file: Path) -> AsyncIterator[Target]:
    """A cluster of a configuration on a free port, ended with the block; raises TriviumError."""
    config = load_config(config_file)
    host = "127.0.0.1" if config.gateway.host in ANY_HOSTS else config.gateway.host
    target = Target(
        f"{host}:{await free_port(host)}", read_token(config.gateway.token_file, "gateway.token_file")
    )
    port = target.address.rpartition(":")[2]
    command = (sys.executable, "-m", "cluster.cli", "serve", str(config_file), "--port", port)
    async with running(command, target):
        yield target


@asynccontextmanager
async def running(command: Sequence[str], target: Target) -> AsyncIterator[None]:
    """A process that serves at a target, ended with the block; raises NodeUnavailable if it does not."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends the cluster
        )
        try:
            await wait_serving(process, target, log)
            yield
        finally:
            await stop(process)


async def wait_serving(process: asyncio.subprocess.Process, target: Target, log: BinaryIO) -> None:
    """Return once a request would be served; raises NodeUnavailable with the end of the log."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while process.returncode is None:
                async with Client(target.address, target.token) as client:
                    if await client.is_serving():
                        return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        pass
    raise NodeUnavailable(
        reason="NOT_READY",
        message=f"the cluster at {target.address} did not start: {last_words(log)}",
        field="CONFIG",
        remedy="Try it alone with `trivium serve CONFIG`.",
    )


def last_words(log: BinaryIO) -> str:
    """How a log ends, in one line."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - LOG_BYTES_TOLD))
    return " ".join(log.read().decode(errors="replace").split())


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a process and wait for it, more and more firmly."""
    for number, patience_s in STOP_S:
        if process.returncode is not None:
            return
        process.send_signal(number)
        try:
            async with asyncio.timeout(patience_s):
                await process.wait()
        except TimeoutError:
            continue
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), host, 0)
    async with server:
        return server.sockets[0].getsockname()[1]
