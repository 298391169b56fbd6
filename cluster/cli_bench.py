"""`trivium bench`: load for a running cluster, or for one cluster after the other, and what came of it.

What was asked for is checked here; the work is a process of its own.
"""

from pathlib import Path
from typing import Annotated

import typer

from cluster.bench.settings import (
    PROFILES,
    BenchSettings,
    LoadSettings,
    as_json,
    check,
    parse_priorities,
    parse_scale,
    parse_shape,
)
from cluster.cli_options import ADDRESS, Address, Json, TokenFile, become, told

bench_app = typer.Typer()

EXAMPLES = """Examples:

trivium bench --rate 4 --duration-s 60 --output report.html

trivium bench --profile azure-code --burst 4 --slo-ttft-s 0.5 --output report.png --output report.json

trivium bench --trace mooncake.jsonl --speed 10 --duration-s 120"""

Configs = Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAML files, such as for `serve`")]
ProfileName = Annotated[str, typer.Option("--profile", help=f"lengths and arrivals: {', '.join(PROFILES)}")]
Scale = Annotated[str, typer.Option("--scale", help="size of lengths, for small models; 1 is real life")]
Rate = Annotated[float, typer.Option("--rate", help="requests per second, whatever the cluster bears")]
Duration = Annotated[
    float | None, typer.Option("--duration-s", help="send for so long; without it 30, or a whole trace")
]
GapCv = Annotated[float | None, typer.Option("--cv", help="unevenness of arrivals; 1 is Poisson's")]
Burst = Annotated[
    float, typer.Option("--burst", help="peak over mean: each period's requests in 1/BURST of it")
]
BurstPeriod = Annotated[float, typer.Option("--burst-period-s", help="from burst to burst")]
PrefixShare = Annotated[
    float | None, typer.Option("--prefix-share", help="share of prompt tokens from a tree of 64 prefixes")
]
PromptTokens = Annotated[
    str | None, typer.Option("--prompt-tokens", help="MEAN/P50/P99 before scaling, or one number")
]
OutputTokens = Annotated[
    str | None, typer.Option("--output-tokens", help="MEAN/P50/P99 before scaling, or one number")
]
Priorities = Annotated[str, typer.Option("--priorities", help="drawn from these evenly, such as -10,0,10")]
Seed = Annotated[int, typer.Option("--seed", help="the same seed plans the same requests")]
Trace = Annotated[
    Path | None, typer.Option("--trace", help="replay a JSONL file in Mooncake's format instead of a profile")
]
Speed = Annotated[float, typer.Option("--speed", help="replay a trace so many times as fast")]
SloTtft = Annotated[float, typer.Option("--slo-ttft-s", help="longest good time to first token")]
SloItl = Annotated[float, typer.Option("--slo-itl-s", help="longest good mean inter-token latency")]
RequestTimeout = Annotated[float, typer.Option("--timeout-s", help="deadline of each request")]
Connections = Annotated[
    int, typer.Option("--connections", help="HTTP/2 connections; gateways share by these")
]
Outputs = Annotated[
    list[Path] | None,
    typer.Option("--output", help="also write a report: .html, .png or .json; may be repeated"),
]


@bench_app.callback(
    invoke_without_command=True,
    epilog=EXAMPLES,
)
def bench(
    context: typer.Context,
    profile: ProfileName = "azure-conversation",
    scale: Scale = "1/64",
    rate: Rate = 2.0,
    duration_s: Duration = None,
    cv: GapCv = None,
    burst: Burst = 1.0,
    burst_period_s: BurstPeriod = 10.0,
    prefix_share: PrefixShare = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    priorities: Priorities = "0",
    seed: Seed = 0,
    trace: Trace = None,
    speed: Speed = 1.0,
    slo_ttft_s: SloTtft = 1.0,
    slo_itl_s: SloItl = 0.1,
    timeout_s: RequestTimeout = 120.0,
    connections: Connections = 1,
    output: Outputs = None,
    address: Address = ADDRESS,
    token_file: TokenFile = None,
    json_output: Json = False,
) -> None:
    """Send load that looks like life; report latencies, goodput and pictures.

    The loop is open: a late answer never holds the next request back. Every request that was offered counts,
    also those that were shed or failed. Ctrl-C reports what was.
    """
    if context.invoked_subcommand is not None:
        return
    with told(json_output):
        when = rate, duration_s, cv, burst, burst_period_s
        lengths = prefix_share, prompt_tokens, output_tokens
        load = load_settings(profile, scale, when, lengths, priorities, seed, trace, speed)
        settings = BenchSettings(
            load=load,
            address=address,
            token_file=token_file,
            timeout_s=timeout_s,
            connections_count=connections,
            slo_ttft_s=slo_ttft_s,
            slo_itl_s=slo_itl_s,
            outputs=tuple(output or ()),
            json_output=json_output,
        )
        become("cluster.bench.main", as_json(check(settings)))


@bench_app.command(
    "compare", epilog="Example: trivium bench compare apart.yaml together.yaml --output report.html"
)
def compare(
    configs: Configs,
    profile: ProfileName = "azure-conversation",
    scale: Scale = "1/64",
    rate: Rate = 2.0,
    duration_s: Duration = None,
    cv: GapCv = None,
    burst: Burst = 1.0,
    burst_period_s: BurstPeriod = 10.0,
    prefix_share: PrefixShare = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    priorities: Priorities = "0",
    seed: Seed = 0,
    trace: Trace = None,
    speed: Speed = 1.0,
    slo_ttft_s: SloTtft = 1.0,
    slo_itl_s: SloItl = 0.1,
    timeout_s: RequestTimeout = 120.0,
    connections: Connections = 1,
    output: Outputs = None,
    json_output: Json = False,
) -> None:
    """Start a cluster of each configuration in turn, send all of them the same requests, and compare.

    Each is started as `trivium serve CONFIG` starts it, on a free gRPC port, and ended before the next.
    """
    with told(json_output):
        when = rate, duration_s, cv, burst, burst_period_s
        lengths = prefix_share, prompt_tokens, output_tokens
        load = load_settings(profile, scale, when, lengths, priorities, seed, trace, speed)
        settings = BenchSettings(
            load=load,
            timeout_s=timeout_s,
            connections_count=connections,
            slo_ttft_s=slo_ttft_s,
            slo_itl_s=slo_itl_s,
            outputs=tuple(output or ()),
            json_output=json_output,
            configs=tuple(configs),
        )
        become("cluster.bench.main", as_json(check(settings)))


def load_settings(profile, scale, when, lengths, priorities, seed, trace, speed) -> LoadSettings:
    """The load that options ask for, their texts read; raises InvalidRequest."""
    prefix_share, prompt_tokens, output_tokens = lengths
    prompt = parse_shape("--prompt-tokens", prompt_tokens)
    output = parse_shape("--output-tokens", output_tokens)
    drawn = prefix_share, prompt, output, parse_priorities(priorities), seed
    return LoadSettings(profile, parse_scale(scale), *when, *drawn, trace, speed)
