"""`trivium scale` and `trivium top`: set how many actors a pool has, and watch the cluster at work."""

import asyncio
import getpass
import json
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from cluster.cli_options import ADDRESS, Address, Json, TokenFile, console, run, told
from cluster.client import Client, as_values
from cluster.errors import InvalidRequest
from cluster.show_experts import heat_map
from cluster.show_pools import decisions_table, outlooks, pages_table, pools_table, pools_view, requests_table
from cluster.token_file import read_token

Counts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[POOL=COUNT]...", help="such as decode=4; it holds until released"),
]
Hold = Annotated[list[str] | None, typer.Option("--hold", help="keep this pool at what it has")]
Release = Annotated[list[str] | None, typer.Option("--release", help="let the load decide about this pool")]
Period = Annotated[float, typer.Option("--period-s", min=0.2, max=60.0, help="time between two looks")]
Once = Annotated[bool, typer.Option("--once", help="one look, then end")]

SCALE_EXAMPLES = """Examples:

trivium scale decode=4 prefill=2

trivium scale --release decode"""


def scale(
    counts: Counts = None,
    hold: Hold = None,
    release: Release = None,
    address: Address = ADDRESS,
    json_output: Json = False,
    token_file: TokenFile = None,
) -> None:
    """Set how many actors pools have; without a count, show how many there are and why."""
    with told(json_output):
        asked = [parse_count(text) for text in counts or ()]
        token = read_token(token_file, "--token-file")
        run(scale_pools(asked, hold or [], release or [], address, token, json_output))


def top(
    address: Address = ADDRESS, period_s: Period = 1.0, once: Once = False, token_file: TokenFile = None
) -> None:
    """Watch pools, pages, experts and the oldest requests, live."""
    with told():
        run(watch(address, read_token(token_file, "--token-file"), period_s, once))


def parse_count(text: str) -> tuple[str, int]:
    """Pool and count of POOL=COUNT; raises InvalidRequest."""
    kind, equals, count = text.partition("=")
    if not equals or not count.isascii() or not count.isdigit():
        raise InvalidRequest(
            reason="INVALID_COUNT",
            message=f"{text[:80]!r} names no count",
            field="POOL=COUNT",
            limit="a pool and a number, such as decode=4",
            remedy="Correct it.",
        )
    return kind, int(count[:9])


def user_name() -> str:
    """Who asks, as far as this host knows; in a container a user may have no name."""
    try:
        return getpass.getuser()[:40]
    except (KeyError, OSError):
        return "somebody"


async def scale_pools(
    counts: list[tuple[str, int]],
    hold: list[str],
    release: list[str],
    address: str,
    token: str | None,
    json_output: bool,
) -> None:
    """Ask for all that was named, in order, and show the pools."""
    by = f"trivium scale, {user_name()}"
    async with Client(address, token) as client:
        for kind in release:
            await client.release_pool(kind)
        for kind, count in [*counts, *((kind, None) for kind in hold)]:
            await client.scale_pool(kind, count, by)
        answer = await client.get_pools()
    print(json.dumps(as_values(answer))) if json_output else console.print(pools_view(answer))


async def watch(address: str, token: str | None, period_s: float, once: bool) -> None:
    """Draw the cluster again and again, until Ctrl-C."""
    async with Client(address, token) as client:
        if once:
            console.print(await whole_view(client))
            return
        with Live(await whole_view(client), console=console, screen=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(period_s)
                live.update(await whole_view(client), refresh=True)


async def whole_view(client: Client) -> RenderableType:
    """Everything on one screen."""
    pools, cluster, experts, requests = await asyncio.gather(
        client.get_pools(), client.get_cluster(), client.get_experts(), client.get_requests(10)
    )
    parts: list[RenderableType] = [pools_table(pools), outlooks(pools), pages_table(cluster)]
    if requests.requests:
        parts.append(requests_table(requests))
    if experts.layers:
        parts.append(heat_map(experts))
    if pools.decisions:
        parts.append(decisions_table(pools.decisions[:3]))
    return Group(*parts)
