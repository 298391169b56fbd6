"""The command line: `trivium serve`, `generate`, `reference`, `status`, `config`.

Commands that need Ray or torch become a process of their own, so that the others answer at once.
"""

import asyncio
import json
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from cluster.client import Admitted, Client, Delta, Finished
from cluster.config import ClusterConfig, check_config, load_config
from cluster.errors import TriviumError
from cluster.show import status_table, stream_to_screen
from cluster.validation import RequestedGeneration, RequestedSampling

ADDRESS = "127.0.0.1:50051"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Serve DeepSeek-V3-family models: prefill here, decode there, experts everywhere.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at a configuration without starting anything.")
app.add_typer(config_app, name="config")
console = Console()
errors = Console(stderr=True)
