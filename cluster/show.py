"""What the command line draws: generations as they stream, and where each pool stands."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.client import Admitted, Delta, Finished
from cluster.proto import trivium_pb2
from cluster.view import View
from decode.messages import NodeReport
from experts.messages import ShardReport

TOKENS_BEFORE_TEXT_MAX = 16  # tokens for which a character may be in the making


async def stream_to_screen(events: AsyncIterator[Admitted | Delta | Finished], console: Console) -> None:
    """Print a generation while it comes, as token ids if it has no text, then one line of what it took."""
    has_text, token_ids = False, []
    async for event in events:
        if isinstance(event, Delta):
            has_text = has_text or bool(event.text)
            token_ids = [] if has_text else [*token_ids, *event.token_ids]
            console.out(printable(event.text), end="", highlight=False)
        if token_ids and (isinstance(event, Finished) or len(token_ids) > TOKENS_BEFORE_TEXT_MAX):
            console.out(*token_ids, "", end="", highlight=False)
            token_ids = []
        if isinstance(event, Finished):
            console.out("")
            console.print(f"[dim]{summary(event)}[/]")


def printable(text: str) -> str:
    """A text without the control characters by which a model could steer the terminal."""
    return "".join(character for character in text if character in "\n\t" or category(character) != "Cc")


def as_cell(text: str) -> str:
    """A text of others for a table, where it means nothing but itself."""
    return escape(printable(text))


async def collect(events: AsyncIterator[Admitted | Delta | Finished]) -> dict[str, Any]:
    """A whole generation as values for JSON."""
    whole: dict[str, Any] = {"text": "", "token_ids": [], "logprobs": []}
    async for event in events:
        match event:
            case Admitted():
                whole |= asdict(event)
            case Delta(text, token_ids, logprobs):
                whole["text"] += text
                whole["token_ids"] += token_ids
                whole["logprobs"] += map(asdict, logprobs)
            case Finished():
                whole |= asdict(event)
    return whole


def summary(finished: Finished) -> str:
    """Tokens and times of one generation in a line."""
    usage, timing = finished.usage, finished.timing
    pace = (usage.output_tokens_count - 1) / timing.decode_s if timing.decode_s > 0 else 0.0
    return (
        f"{finished.finish_reason}: {usage.prompt_tokens_count} tokens in "
        f"({usage.cached_tokens_count} cached), "
        f"{usage.output_tokens_count} out; queued {timing.queued_s * 1e3:.0f} ms, "
        f"prefill {timing.prefill_s * 1e3:.0f} ms, transfer {timing.transfer_s * 1e3:.1f} ms, "
        f"decode {timing.decode_s * 1e3:.0f} ms ({pace:.0f} tokens/s)"
    )


def cluster_table(view: View, address: str, dashboard: str) -> Table:
    """Every actor of a cluster that has just started."""
    table = Table(
        title=f"serving at {address}", caption=f"Ray dashboard: http://{dashboard}" if dashboard else None
    )
    for column in ("actor", "pool", "state", "process", "holds"):
        table.add_column(column)
    for member in view.members:
        table.add_row(
            member.name,
            member.kind,
            member.state,
            as_cell(f"{member.host}:{member.pid}"),
            holds(member.report),
        )
    return table


def holds(report: NodeReport | ShardReport | None) -> str:
    """What an actor has room for, in words."""
    if isinstance(report, NodeReport):
        return f"{report.pages_total_count} pages of latents"
    if isinstance(report, ShardReport):
        return f"{report.experts_count} experts"
    return ""


def status_table(cluster: trivium_pb2.GetClusterResponse, model: trivium_pb2.GetModelResponse) -> Table:
    """Every node and shard with its load, as a gateway tells it; 80 columns are enough."""
    table = Table(
        title=as_cell(f"{model.name}, {model.family}, {model.context_tokens_max} tokens of context"),
        caption=f"pages: free + cached + leased; placement of experts number {cluster.placement_epoch}",
    )
    for column in ("name", "state", "requests", "waiting", "pages", "tokens/s", "holds"):
        table.add_column(column, justify="left" if column in ("name", "state") else "right", no_wrap=True)
    for node in cluster.nodes:
        pages = (node.pages_free_count, node.pages_cached_count, node.pages_leased_count)
        computes = node.pages_total_count > 0
        table.add_row(
            as_cell(node.name),
            state_name(node.state),
            str(node.requests_running_count),
            str(node.requests_waiting_count) if computes else "",
            "+".join(map(str, pages)) if computes else "",
            f"{node.tokens_per_s:.0f}" if computes else "",
        )
    for shard in cluster.shards:
        name, state = as_cell(shard.name), state_name(shard.state)
        table.add_row(name, state, *[""] * 4, f"{shard.experts_count} experts")
    return table


def state_name(state: trivium_pb2.State) -> str:
    """A state as people say it."""
    return trivium_pb2.State.Name(state).removeprefix("STATE_").lower()
