"""What all commands share: their options, how errors are told, and how or as what their work is run."""

import asyncio
import json
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from cluster.errors import TriviumError
from cluster.requests import error_values

ADDRESS = "127.0.0.1:50051"

console = Console()

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="YAML file, such as examples/local.yaml")
]
ModelFolder = Annotated[
    Path | None, typer.Option("--model", help="folder of the checkpoint; overrides the file")
]
Text = Annotated[str | None, typer.Argument(metavar="TEXT", help="the prompt")]
TokenIds = Annotated[str | None, typer.Option("--token-ids", help="the prompt as ids, such as 1,2,3")]
Chat = Annotated[bool, typer.Option("--chat", help="send TEXT as a user's message through the chat template")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="tokens to generate at most")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 is greedy; without it 1")]
TopK = Annotated[int | None, typer.Option("--top-k", help="keep the k likeliest tokens")]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="keep the likeliest tokens up to this probability")
]
MinP = Annotated[float | None, typer.Option("--min-p", help="drop tokens below this share of the likeliest")]
Seed = Annotated[int | None, typer.Option("--seed", help="draw the same tokens again")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="end before this text; may be repeated")]
Logprobs = Annotated[
    int | None, typer.Option("--logprobs", help="report so many likely tokens each time (--json)")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="go on past the end of text")]
Address = Annotated[
    str,
    typer.Option(
        "--address", help="host:port of a gateway; grpcs://host:port by TLS", envvar="TRIVIUM_ADDRESS"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document instead of text")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="file with the bearer token")]
Timeout = Annotated[float | None, typer.Option("--timeout-s", help="give up after so many seconds")]


class told:
    """Tells a TriviumError to people on stderr, to programs as JSON on stdout, and ends with status 1."""

    def __init__(self, json_output: bool = False):
        self._json_output = json_output

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TriviumError):
            if self._json_output:
                print(json.dumps(error_values(error)))
            told_to = Console(stderr=True)
            told_to.print(f"[red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end; Ctrl-C cancels the request and ends with 130."""
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def become(module: str, *arguments: str) -> NoReturn:
    """Go on as another Python module of ours, in this same process id."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
