"""`trivium experts`: where they are and how loaded, what a rebalance would bring, and moving them."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli_options import ADDRESS, Address, Json, TokenFile, console, run, told
from cluster.client import Client, as_values, no_plan, read_plan
from cluster.show_experts import experts_view, plan_table
from cluster.token_file import read_token

PICTURE_COLUMNS_MIN = 100
PLAN_BYTES_MAX = 64 << 20

experts_app = typer.Typer(help="See where experts are and how loaded; move them.")

Picture = Annotated[
    Path | None, typer.Option("--output", help="also write the picture, as .html or .svg", dir_okay=False)
]
PlanOutput = Annotated[
    Path | None, typer.Option("--output", help="write the plan, for `trivium experts move`", dir_okay=False)
]
PlanFile = Annotated[
    Path, typer.Argument(metavar="PLAN", help="file that `trivium experts plan` has written")
]


@experts_app.callback(invoke_without_command=True, epilog="Example: trivium experts --output experts.html")
def show(
    context: typer.Context,
    output: Picture = None,
    address: Address = ADDRESS,
    json_output: Json = False,
    token_file: TokenFile = None,
) -> None:
    """A heat map of load by layer and shard, and how even it is; or see the commands below."""
    if context.invoked_subcommand is not None:
        return
    with told(json_output):
        run(show_experts(address, read_token(token_file, "--token-file"), output, json_output))


@experts_app.command("plan", epilog="Example: trivium experts plan --output plan.json")
def plan(
    output: PlanOutput = None,
    address: Address = ADDRESS,
    json_output: Json = False,
    token_file: TokenFile = None,
) -> None:
    """What a rebalance would bring and take; nothing moves."""
    with told(json_output):
        run(show_plan(address, read_token(token_file, "--token-file"), output, json_output))


@experts_app.command("move", epilog="Example: trivium experts move plan.json")
def move(
    plan_file: PlanFile, address: Address = ADDRESS, json_output: Json = False, token_file: TokenFile = None
) -> None:
    """Move experts as a plan says, while requests run."""
    with told(json_output):
        run(move_experts(address, read_token(token_file, "--token-file"), plan_file, json_output))


async def show_experts(address: str, token: str | None, output: Path | None, json_output: bool) -> None:
    """Print the heat map, and write it where asked."""
    async with Client(address, token) as client:
        experts = await client.get_experts()
    if json_output:
        print(json.dumps(as_values(experts)))
    else:
        console.print(experts_view(experts))
    if output is not None:
        columns = max(PICTURE_COLUMNS_MIN, 14 * (len(experts.shards) + 2))
        with Path("/dev/null").open("w") as nowhere:
            picture = Console(record=True, width=columns, file=nowhere)
            picture.print(experts_view(experts))
        if output.suffix == ".svg":
            picture.save_svg(str(output), title="trivium experts")
        else:
            picture.save_html(str(output))


async def show_plan(address: str, token: str | None, output: Path | None, json_output: bool) -> None:
    """Print what a rebalance would do, and write its homes where asked."""
    async with Client(address, token) as client:
        answer = await client.plan_experts()
    print(json.dumps(as_values(answer))) if json_output else console.print(plan_table(answer))
    if output is not None:
        output.write_text(json.dumps(as_values(answer)))


async def move_experts(address: str, token: str | None, plan_file: Path, json_output: bool) -> None:
    """Send a plan's homes."""
    wanted = read_plan(read_file(plan_file))
    async with Client(address, token) as client:
        answer = await client.move_experts(wanted.layers, wanted.placement_epoch)
    print(json.dumps(as_values(answer))) if json_output else console.print(plan_table(answer))


def read_file(path: Path) -> str:
    """A plan's text; raises InvalidRequest for a file that cannot be one."""
    try:
        with path.open() as file:
            text = file.read(PLAN_BYTES_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise no_plan(f"{path.name} cannot be read: {reason}") from error
    if len(text) > PLAN_BYTES_MAX:
        raise no_plan(f"{path.name} is too long to be a plan", f"{PLAN_BYTES_MAX} characters")
    return text
