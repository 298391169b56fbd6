"""The driver of `trivium serve`: starts Ray, deploys the pools, tells how far they are, and ends them.

A process of its own (`python -m cluster.launch CONFIG_JSON`), since it needs Ray and torch and the other
commands do not.
"""

import asyncio
import json
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
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster import pools
from cluster.client import Client
from cluster.config import ClusterConfig, check_config
from cluster.errors import InvalidConfig, TriviumError
from cluster.gateway_report import GatewayReport
from cluster.model_folder import open_checkpoint
from cluster.place import check_shards, make_place, shards_bounds
from cluster.show import cluster_table, stream_to_screen
from cluster.stats_line import stats_line
from cluster.tls import server_credentials
from cluster.token_file import read_token
from cluster.validation import RequestedGeneration, RequestedSampling
from cluster.view import READY, View
from kernels.transport.errors import ChannelError
from kernels.transport.sockets import bind

GREETING = "The place where three roads meet"
GREETING_IDS = (1, 2, 3)  # for a model without a tokenizer
GREETING_TOKENS = 48
GREETING_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 600.0
POLL_S = 0.1
STATS_EVERY_S = 10.0
SIGNALS = (signal.SIGTERM, signal.SIGHUP)

console = Console()


class Cluster:
    """A running cluster that this process has started."""

    def __init__(self, config: ClusterConfig):
        self.config = config
        self.sockets_folder = tempfile.mkdtemp(prefix="trivium-")
        self.dashboard = ""
        self._is_deployed = False

    def start(self, on_stage: Callable[[str], None], on_view: Callable[[View], None]) -> View:
        """Start everything; returns when a request would be served. Raises TriviumError."""
        on_stage("checking the model")
        check_model(self.config)
        check_surroundings(self.config)
        on_stage("starting Ray")
        self.dashboard = pools.start_ray(self.config.dashboard.enabled, self.config.dashboard.port)
        on_stage("starting the pools")
        self._is_deployed = True
        pools.deploy(make_place(self.config, self.sockets_folder))
        return self._wait_ready(on_view)

    def stop(self) -> None:
        """End every process and remove what was left on disk."""
        try:
            pools.stop(self._is_deployed)
        finally:
            shutil.rmtree(self.sockets_folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Where clients connect."""
        gateways = pools.view().of_kind("gateway")
        return gateways[0].address if gateways else f"{self.config.gateway.host}:{self.config.gateway.port}"

    def _wait_ready(self, on_view: Callable[[View], None]) -> View:
        end_s = time.monotonic() + READY_TIMEOUT_S
        awaited = set(counts(self.config))
        while time.monotonic() < end_s:
            view = pools.view()
            on_view(view)
            awaited &= incomplete(view, self.config)  # one that was whole may follow the load by now
            if view.is_ready and not awaited:
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
    return view.is_ready and not incomplete(view, config)


def incomplete(view: View, config: ClusterConfig) -> set[str]:
    """Kinds of which fewer actors are ready than were asked for."""
    return {
        kind
        for kind, count in counts(config).items()
        if sum(member.state == READY for member in view.of_kind(kind)) < count
    }


def check_model(config: ClusterConfig) -> None:
    """Read the model's headers once before anything is started; raises InvalidModel or InvalidConfig."""
    checkpoint = open_checkpoint(config.model.folder)
    check_shards(config, shards_bounds(checkpoint.config, config))
    for notice in checkpoint.notices:
        console.print(f"[yellow]note[/] {escape(notice)}")


def check_surroundings(config: ClusterConfig) -> None:
    """See that ports are free and the token can be read, before anything is started; raises InvalidConfig."""
    read_token(config.gateway.token_file, "gateway.token_file")
    server_credentials(config.gateway)
    read_token(config.transport.secret_file, "transport.secret_file")
    read_token(config.operations.token_file, "operations.token_file")
    if pools.joins_existing():
        return  # gateways and dashboard may be on other hosts
    check_port(config.gateway.host, config.gateway.port, "gateway.port")
    if config.dashboard.enabled:
        check_port("127.0.0.1", config.dashboard.port, "dashboard.port")
    if config.operations.enabled:
        check_port(config.operations.host, config.operations.port, "operations.port")


def check_port(host: str, port: int, field: str) -> None:
    """Raises InvalidConfig if a port is taken: a gateway would quietly share it with another cluster's."""
    try:
        bind(f"tcp://{host}:{port}").close()
    except ChannelError as error:
        raise InvalidConfig(
            reason="PORT_TAKEN",
            message=str(error),
            field=field,
            remedy="Name a free port and an address of this host, or port 0 for any free one.",
        ) from error


def start_with_progress(cluster: Cluster) -> View:
    """Start a cluster with a line for each stage and a bar for each pool."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=not console.is_terminal
    ) as progress:
        stages: list[int] = []
        bars: dict[str, int] = {}

        def on_stage(stage: str) -> None:
            for task in stages:
                progress.update(task, completed=1)
            stages.append(progress.add_task(stage, total=1, note=""))
            if not console.is_terminal:
                console.print(f"{stage} ...")

        def on_view(view: View) -> None:
            for kind, count in counts(cluster.config).items():
                members = view.of_kind(kind)
                if kind not in bars:
                    bars[kind] = progress.add_task(f"  {kind}", total=count, note="")
                done = sum(member.loaded_share for member in members)
                progress.update(bars[kind], completed=done, note=f"{len(members)} of {count}")

        view = cluster.start(on_stage, on_view)
        for task in stages:
            progress.update(task, completed=1)
    return view


def counts(config: ClusterConfig) -> dict[str, int]:
    """How many actors of each kind are wanted."""
    return {
        "gateway": config.gateway.count,
        "prefill": config.prefill.count,
        "decode": config.decode.count,
        "experts": config.experts.shards_count,
    }


async def greet(address: str, token: str | None) -> None:
    """Stream one real generation to the screen; raises TriviumError."""
    async with Client(address, token) as client:
        model = await client.get_model()
        length = min(GREETING_TOKENS, model.context_tokens_max // 2)
        sampling = RequestedSampling(temperature=0.0, tokens_max=length, ignore_eos=True)
        prompt = {"text": GREETING} if model.has_tokenizer else {"token_ids": GREETING_IDS}
        request = RequestedGeneration(**prompt, sampling=sampling)
        console.print(f"[bold]> {escape(GREETING if model.has_tokenizer else str(GREETING_IDS))}[/]")
        await stream_to_screen(client.generate(request, timeout_s=GREETING_TIMEOUT_S), console)


def tell_until_signal() -> None:
    """Print a line of what is going on from time to time, until Ctrl-C or asked to end."""
    ended = threading.Event()
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, lambda *_: ended.set())
    before, before_s = pools.view(), time.monotonic()
    while not ended.wait(STATS_EVERY_S):
        view, now_s = pools.view(), time.monotonic()
        line = stats_line(before, view, now_s - before_s)
        if is_at_work(before, view):
            console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(line)}", soft_wrap=True)
        before, before_s = view, now_s


def is_at_work(before: View, now: View) -> bool:
    """Whether requests came, ran or ended between two looks, or actors came or went."""
    came = activity(now) != activity(before)
    return came or any(running_count for _, running_count in activity(now).values())


def activity(view: View) -> dict[str, tuple[int, int]]:
    """Of each member what it has admitted and what it runs, both 0 for all but gateways."""
    return {
        member.name: (report.admitted_count, report.requests_count)
        if isinstance(report := member.report, GatewayReport)
        else (0, 0)
        for member in view.members
    }


def main(config_json: str, greeting: bool = False, once: bool = False) -> None:
    """Serve until told to stop: 0 if told once it served, 1 for an error, 128 + signal if told before."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    cluster = None
    try:
        cluster = Cluster(check_config(json.loads(config_json), "command line", Path.cwd()))
        serve(cluster, greeting or once, once)
    except TriviumError as error:
        told_to = Console(stderr=True)
        told_to.print(f"[red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for number in (signal.SIGINT, *SIGNALS):  # so that nothing is left half ended
            signal.signal(number, signal.SIG_IGN)
        if cluster is not None:
            console.print("ending every process ...")
            cluster.stop()
            console.print("ended.")


def serve(cluster: Cluster, greeting: bool, once: bool) -> None:
    """Start a cluster, show it, and wait for its end; raises TriviumError."""
    view = start_with_progress(cluster)
    address = cluster.address
    console.print(cluster_table(view, address, cluster.dashboard))
    page = pools.pools_page()
    if page:
        console.print(f"Pools page: {page}", soft_wrap=True, highlight=False)
    if greeting:
        asyncio.run(greet(address, read_token(cluster.config.gateway.token_file, "gateway.token_file")))
    if not once:
        console.print("Ctrl-C ends it.")
        tell_until_signal()


if __name__ == "__main__":
    typer.run(main)
