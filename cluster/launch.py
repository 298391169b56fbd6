"""The driver of `trivium serve`: starts Ray, deploys the pools, tells how far they are, and ends them.

A process of its own (`python -m cluster.launch CONFIG_JSON`), since it needs Ray and torch and the other
commands do not.
"""

import asyncio
import json
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster import pools
from cluster.client import Client
from cluster.config import ClusterConfig, check_config
from cluster.errors import InvalidConfig, TriviumError
from cluster.membership import View
from cluster.model_folder import open_checkpoint
from cluster.place import Place
from cluster.show import cluster_table, stream_to_screen
from cluster.validation import RequestedGeneration, RequestedSampling

GREETING = "The place where three roads meet"
GREETING_TOKENS = 48
READY_TIMEOUT_S = 600.0
POLL_S = 0.1
KINDS = ("gateway", "prefill", "decode", "experts")

console = Console()


class Cluster:
    """A running cluster that this process has started."""

    def __init__(self, config: ClusterConfig):
        self.config = config
        self.sockets_folder = tempfile.mkdtemp(prefix="trivium-")
        self.dashboard = ""

    def start(self, on_stage: Callable[[str], None], on_view: Callable[[View], None]) -> View:
        """Start everything; returns when a request would be served. Raises TriviumError, NotReady."""
        on_stage("checking the model")
        check_model(self.config)
        on_stage("starting Ray")
        self.dashboard = pools.start_ray(self.config.dashboard.enabled, self.config.dashboard.port).dashboard
        on_stage("starting the pools")
        pools.deploy(Place(self.config, secrets.token_hex(32), self.sockets_folder))
        return self._wait_ready(on_view)

    def stop(self) -> None:
        """End every process and remove what was left on disk."""
        pools.stop()
        shutil.rmtree(self.sockets_folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Where clients connect."""
        gateways = pools.view().of_kind("gateway")
        return gateways[0].address if gateways else f"{self.config.gateway.host}:{self.config.gateway.port}"

    def _wait_ready(self, on_view: Callable[[View], None]) -> View:
        end_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < end_s:
            view = pools.view()
            on_view(view)
            if is_complete(view, self.config):
                return view
            if problems := pools.problems():
                raise not_ready("; ".join(problems))
            time.sleep(POLL_S)
        raise not_ready(f"it was not ready after {READY_TIMEOUT_S:.0f} s")


def not_ready(why: str) -> InvalidConfig:
    """The cluster cannot start."""
    return InvalidConfig(
        reason="NOT_READY",
        message=f"the cluster did not start: {why}",
        remedy="The actors' logs, in Ray's session folder under logs/serve, say more.",
    )


def is_complete(view: View, config: ClusterConfig) -> bool:
    """Whether every actor that was asked for is here, and a request would be served."""
    wanted = (config.gateway.count, config.prefill.count, config.decode.count, config.experts.shards_count)
    counts = tuple(len(view.of_kind(kind)) for kind in KINDS)
    return view.is_ready and all(count >= one for count, one in zip(counts, wanted, strict=True))


def check_model(config: ClusterConfig) -> None:
    """Read the model's headers once before anything is started; raises InvalidModel."""
    checkpoint = open_checkpoint(config.model.folder)
    shards, experts = config.experts.shards_count, checkpoint.config.routed_experts_count
    if checkpoint.config.moe_layers and shards > experts:
        raise InvalidConfig(
            reason="TOO_MANY_SHARDS",
            message=f"{shards} shards cannot share {experts} experts",
            field="experts.shards_count",
            limit=str(experts),
            remedy="Ask for fewer shards.",
        )
    for notice in checkpoint.notices:
        console.print(f"[yellow]note[/] {notice}")


def start_with_progress(cluster: Cluster) -> View:
    """Start a cluster with a line for each stage and a bar for each pool."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=not console.is_terminal) as progress:
        stages: list[int] = []
        bars: dict[str, int] = {}

        def on_stage(stage: str) -> None:
            for task in stages:
                progress.update(task, completed=1)
            stages.append(progress.add_task(stage, total=1, note=""))
            if not console.is_terminal:
                console.print(f"{stage} ...")

        def on_view(view: View) -> None:
            for kind, count in zip(KINDS, counts(cluster.config), strict=True):
                members = view.of_kind(kind)
                task = bars.setdefault(kind, progress.add_task(f"  {kind}", total=count, note="")) if kind not in bars else bars[kind]
                done = sum(member.loaded_share for member in members)
                progress.update(task, completed=done, note=f"{len(members)} of {count}")

        view = cluster.start(on_stage, on_view)
        for task in stages:
            progress.update(task, completed=1)
    return view


def counts(config: ClusterConfig) -> tuple[int, int, int, int]:
    """How many actors of each kind are wanted."""
    return (config.gateway.count, config.prefill.count, config.decode.count, config.experts.shards_count)


async def greet(address: str) -> None:
    """Stream one real generation to the screen."""
    request = RequestedGeneration(
        text=GREETING, sampling=RequestedSampling(temperature=0.0, tokens_max=GREETING_TOKENS, ignore_eos=True)
    )
    async with Client(address) as client:
        await stream_to_screen(client.generate(request, timeout_s=120.0), console)


def wait_for_signal() -> None:
    """Return at Ctrl-C or when asked to end."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


def main(config_json: str, greeting: bool = False, once: bool = False) -> None:
    """Serve until told to stop."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cluster = Cluster(check_config(json.loads(config_json), "command line", Path.cwd()))
    try:
        view = start_with_progress(cluster)
        console.print(cluster_table(view, cluster.address, cluster.dashboard))
        if greeting or once:
            asyncio.run(greet(cluster.address))
        if not once:
            console.print("Ctrl-C ends it.")
            wait_for_signal()
    except TriviumError as error:
        console.print(f"[red]error[/] {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        cluster.stop()


if __name__ == "__main__":
    typer.run(main)
