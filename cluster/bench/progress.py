"""A line that shows a run while it runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.bench.run import Live

REFRESH_S = 0.25
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[note]}"),
    TimeElapsedColumn(),
)


@asynccontextmanager
async def progress_of(name: str, live: Live, console: Console) -> AsyncIterator[None]:
    """Show the counts of a run until the block ends."""
    with Progress(*COLUMNS, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(escape(name), total=live.planned_count, note="")
        following = asyncio.create_task(follow(progress, task, live))
        try:
            yield
        finally:
            following.cancel()


async def follow(progress: Progress, task: int, live: Live) -> None:
    """Draw the counts again and again."""
    before, before_s = 0, perf_counter()
    while True:
        await asyncio.sleep(REFRESH_S)
        now_s = perf_counter()
        tokens_per_s = (live.tokens_count - before) / (now_s - before_s)
        before, before_s = live.tokens_count, now_s
        ended_count = live.completed_count + live.failed_count
        progress.update(task, completed=ended_count, note=note(live, tokens_per_s))
        progress.refresh()


def note(live: Live, tokens_per_s: float) -> str:
    """Counts in words."""
    failed = f"[red]{live.failed_count} failed[/]" if live.failed_count else "0 failed"
    counts = f"{live.in_flight_count} in flight, {live.completed_count} done, {failed}"
    return f"{counts}, {tokens_per_s:.0f} tokens/s"
