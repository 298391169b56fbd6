"""The command line: `trivium serve`, `generate`, `reference`, `status`, `experts`, `config`.

Commands that need Ray or torch become a process of their own, so that the others answer at once.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli_bench import bench_app
from cluster.cli_experts import experts_app
from cluster.cli_operations import SCALE_EXAMPLES, scale, top
from cluster.cli_options import (
    ADDRESS,
    Address,
    Chat,
    ConfigFile,
    IgnoreEos,
    Json,
    Logprobs,
    MaxTokens,
    MinP,
    ModelFolder,
    Seed,
    Stop,
    Temperature,
    Text,
    Timeout,
    TokenFile,
    TokenIds,
    TopK,
    TopP,
    become,
    console,
    run,
    told,
)
from cluster.client import Client, as_values
from cluster.config import ClusterConfig, check_config, load_config
from cluster.errors import InvalidConfig, InvalidRequest
from cluster.requests import as_json, read_token_ids
from cluster.show import collect, status_table, stream_to_screen
from cluster.token_file import read_token
from cluster.validation import ChatMessage, RequestedGeneration, RequestedSampling

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Serve DeepSeek-V3-family models: prefill here, decode there, experts everywhere.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at a configuration without starting anything.")
app.add_typer(config_app, name="config")
app.add_typer(experts_app, name="experts")
app.add_typer(bench_app, name="bench")
app.command(epilog=SCALE_EXAMPLES)(scale)
app.command(epilog="Example: trivium top --period-s 2")(top)


@app.command(epilog="Example: trivium serve examples/local.yaml --decode 2")
def serve(
    config: ConfigFile = None,
    model: ModelFolder = None,
    prefill: Annotated[int | None, typer.Option(help="prefill nodes")] = None,
    decode: Annotated[int | None, typer.Option(help="decode nodes")] = None,
    shards: Annotated[int | None, typer.Option(help="expert shards")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes any free one")] = None,
    greet: Annotated[
        bool, typer.Option("--greet", help="stream one generation to the screen when ready")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="greet, then end every process")] = False,
) -> None:
    """Start a cluster on this host and serve until Ctrl-C."""
    with told():
        checked = configured(config, model).with_overrides(
            prefill=prefill, decode=decode, shards=shards, port=port
        )
        flags = [flag for flag, wanted in (("--greeting", greet), ("--once", once)) if wanted]
        become("cluster.launch", checked.model_dump_json(), *flags)


@app.command(epilog='Example: trivium generate "Once upon a time" --max-tokens 32 --temperature 0')
def generate(
    text: Text = None,
    token_ids: TokenIds = None,
    chat: Chat = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Logprobs = None,
    ignore_eos: IgnoreEos = False,
    address: Address = ADDRESS,
    json_output: Json = False,
    token_file: TokenFile = None,
    timeout_s: Timeout = None,
) -> None:
    """Send one request to a running cluster and stream its answer."""
    with told(json_output):
        sampling = sampled(max_tokens, temperature, top_k, top_p, min_p, seed, stop, logprobs, ignore_eos)
        request = asked(text, token_ids, chat, sampling)
        run(send(request, address, read_token(token_file, "--token-file"), timeout_s, json_output))


@app.command(
    epilog="Example: trivium reference --model examples/trivium-small --token-ids 1,2,3 --temperature 0"
)
def reference(
    text: Text = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file that names the model")] = None,
    model: ModelFolder = None,
    token_ids: TokenIds = None,
    chat: Chat = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Logprobs = None,
    ignore_eos: IgnoreEos = False,
    json_output: Json = False,
) -> None:
    """Answer the same request in one process without Ray: the truth that a cluster is compared with."""
    with told(json_output):
        sampling = sampled(max_tokens, temperature, top_k, top_p, min_p, seed, stop, logprobs, ignore_eos)
        request = asked(text, token_ids, chat, sampling)
        checked = configured(config, model)
        flags = ["--json"] if json_output else []
        become("cluster.reference_run", checked.model_dump_json(), as_json(request), *flags)


@app.command(epilog="Example: trivium status --json")
def status(address: Address = ADDRESS, json_output: Json = False, token_file: TokenFile = None) -> None:
    """Where each pool of a running cluster stands."""
    with told(json_output):
        run(show_status(address, read_token(token_file, "--token-file"), json_output))


@config_app.command("check", epilog="Example: trivium config check examples/local.yaml")
def config_check(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]) -> None:
    """Say whether a file is a valid configuration, and if not what to change."""
    with told():
        checked = load_config(config)
        console.print(f"[green]valid[/] {escape(str(config))}", soft_wrap=True)
        if not checked.model.folder.is_dir():
            note = f"model.folder {checked.model.folder} is not on this host"
            console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


@config_app.command("show", epilog="Example: trivium config show examples/local.yaml")
def config_show(config: ConfigFile = None, json_output: Json = False) -> None:
    """Every key with its value and meaning; without a file the defaults."""
    with told(json_output):
        checked = (
            load_config(config)
            if config
            else check_config({"model": {"folder": "."}}, "defaults", Path.cwd())
        )
        if json_output:
            console.print_json(checked.model_dump_json())
        else:
            console.print(config_table(checked, of_a_file=config is not None))


def configured(config: Path | None, model: Path | None) -> ClusterConfig:
    """The file's configuration, or the defaults for a model folder; raises InvalidConfig."""
    if config is not None:
        return load_config(config).with_overrides(model=model)
    if model is not None:
        return check_config({"model": {"folder": str(model)}}, "command line", Path.cwd())
    raise InvalidConfig(
        reason="NO_MODEL",
        message="neither a configuration nor a model is named",
        field="CONFIG or --model",
        remedy="Try `trivium serve examples/local.yaml`, or name a checkpoint's folder with --model.",
    )


def asked(
    text: str | None, token_ids: str | None, chat: bool, sampling: RequestedSampling
) -> RequestedGeneration:
    """The request that a command line asks for; raises InvalidRequest where it asks for none or two."""
    if (text is None) == (token_ids is None):
        raise InvalidRequest(
            reason="ONE_PROMPT",
            message="there must be one prompt",
            field="TEXT or --token-ids",
            remedy='Give a text, as in `trivium generate "Once upon a time"`, or --token-ids 1,2,3.',
        )
    if token_ids is not None and chat:
        raise InvalidRequest(
            reason="CHAT_WITHOUT_TEXT",
            message="a chat template needs a text",
            field="--chat",
            remedy="Give TEXT instead of --token-ids, or leave --chat out.",
        )
    if token_ids is not None:
        return RequestedGeneration(token_ids=read_token_ids(token_ids), sampling=sampling)
    if chat:
        return RequestedGeneration(messages=(ChatMessage("user", text),), sampling=sampling)
    return RequestedGeneration(text=text, sampling=sampling)


def sampled(
    tokens_max, temperature, top_k, top_p, min_p, seed, stop, logprobs, ignore_eos
) -> RequestedSampling:
    """Sampling parameters in the words of the validator."""
    return RequestedSampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        tokens_max=tokens_max,
        stop_strings=tuple(stop or ()),
        logprobs_count=logprobs,
        ignore_eos=ignore_eos,
    )


async def send(
    request: RequestedGeneration, address: str, token: str | None, timeout_s: float | None, json_output: bool
) -> None:
    """Send a request and show its answer as it comes, or whole as JSON."""
    async with Client(address, token) as client:
        events = client.generate(request, timeout_s)
        if json_output:
            print(json.dumps(await collect(events)))
        else:
            await stream_to_screen(events, console)


async def show_status(address: str, token: str | None, json_output: bool) -> None:
    """Print what a gateway knows of the cluster."""
    async with Client(address, token) as client:
        model, cluster = await client.get_model(), await client.get_cluster()
        if json_output:
            print(json.dumps({"model": as_values(model), "cluster": as_values(cluster)}))
        else:
            console.print(status_table(cluster, model))


def config_table(config: ClusterConfig, of_a_file: bool) -> Table:
    """Every key, its value, and what it means; without a file, what must be given has no default."""
    table = Table(show_lines=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("meaning")
    for name, field in type(config).model_fields.items():
        section = getattr(config, name)
        if not hasattr(type(section), "model_fields"):
            table.add_row(name, escape(str(section)), field.description)
            continue
        for key, inner in type(section).model_fields.items():
            value = "(no default)" if inner.is_required() and not of_a_file else str(getattr(section, key))
            table.add_row(f"{name}.{key}", escape(value), inner.description)
    return table


if __name__ == "__main__":
    app()
