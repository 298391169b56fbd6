"""One line of what a cluster has done since a moment ago, for logs: pure."""

from collections.abc import Callable, Iterator

from cluster.distribution import Distribution, merged
from cluster.gateway_report import GatewayReport
from cluster.metric_values import dispatches
from cluster.scaling import KINDS
from cluster.view import Member, View
from decode.messages import NodeReport

Reports = list[tuple[GatewayReport, GatewayReport]] | list[tuple[NodeReport, NodeReport]]
"""(before, now) of members that were there both times: the others' counts are of another while."""


def stats_line(before: View, now: View, took_s: float) -> str:
    """Rates, times and fill in one line; `took_s` lies between the views, and what nobody did is left out."""
    known = {member.name: member for member in before.members}
    parts = [_actors(now)]
    gateways = _pairs(known, now.of_kind("gateway"), GatewayReport)
    if gateways:
        parts.extend(_requests(gateways, took_s))
    for kind in ("prefill", "decode"):
        parts.extend(_nodes(kind, _pairs(known, now.of_kind(kind), NodeReport), took_s))
    return "; ".join(parts)


def _pairs(known: dict[str, Member], members: tuple[Member, ...], kind: type) -> Reports:
    return [
        (known[member.name].report, member.report)
        for member in members
        if isinstance(member.report, kind)
        and member.name in known
        and isinstance(known[member.name].report, kind)
    ]


def _actors(view: View) -> str:
    return ", ".join(f"{len(view.of_kind(kind))} {kind}" for kind in KINDS)


def _requests(pairs: Reports, took_s: float) -> Iterator[str]:
    running_count = sum(now.requests_running_count for _, now in pairs)
    waiting_count = sum(now.requests_waiting_count for _, now in pairs)
    yield f"requests {running_count} running, {waiting_count} waiting"
    finished_count = _risen(pairs, lambda report: sum(report.finished_counts.values()))
    prompt_tokens_count = _risen(pairs, lambda report: report.prompt_tokens_count)
    output_tokens_count = _risen(pairs, lambda report: report.output_tokens_count)
    if prompt_tokens_count or output_tokens_count or finished_count:
        yield (
            f"{finished_count / took_s:.1f} finished/s, {prompt_tokens_count / took_s:.0f} tokens/s in, "
            f"{output_tokens_count / took_s:.0f} out"
        )
    troubles = {
        "failed": _risen(pairs, lambda report: sum(report.failed_counts.values())),
        "shed": _risen(pairs, lambda report: report.shed_count),
        "cancelled": _risen(pairs, lambda report: report.cancelled_count),
        "retried": _risen(pairs, lambda report: report.retried_count),
    }
    if any(troubles.values()):
        yield ", ".join(f"{count} {word}" for word, count in troubles.items() if count)
    first = merged(now.time_to_first_token_s.since(then.time_to_first_token_s) for then, now in pairs)
    gaps = merged(now.inter_token_s.since(then.inter_token_s) for then, now in pairs)
    yield from _times("first token", first)
    yield from _times("between tokens", gaps)


def _nodes(kind: str, pairs: Reports, took_s: float) -> Iterator[str]:
    if not pairs:
        return
    total_count = sum(now.pages_total_count for _, now in pairs)
    leased_count = sum(now.pages_leased_count for _, now in pairs)
    busy_share = _risen(pairs, lambda report: report.busy_s) / (took_s * len(pairs))
    leased_share = leased_count / total_count if total_count else 0.0
    yield f"{kind} {busy_share:.0%} busy, {leased_share:.0%} of pages leased"
    bytes_count = _risen(pairs, lambda report: report.latents_bytes) if kind == "decode" else 0
    if bytes_count:
        yield f"latents {bytes_count / took_s / 1e6:.1f} MB/s"
    dispatched = merged(dispatches(now.dispatch).since(dispatches(then.dispatch)) for then, now in pairs)
    yield from _times(f"{kind} dispatch", dispatched)


def _risen(pairs: Reports, count: Callable[[GatewayReport | NodeReport], float]) -> float:
    """By how much a count has risen, all reporters together."""
    return sum(count(now) - count(then) for then, now in pairs)


def _times(what: str, distribution: Distribution) -> Iterator[str]:
    if distribution.count:
        half, most = distribution.quantile(0.5), distribution.quantile(0.99)
        yield f"{what} {_shown(half)}, at most {_shown(most)} in 99 %"


def _shown(time_s: float) -> str:
    return f"{time_s:.1f} s" if time_s >= 1 else f"{time_s * 1e3:.3g} ms"
