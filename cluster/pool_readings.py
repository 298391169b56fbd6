"""From what members tell and Serve shows to one reading for each pool: sums, and rates over a short while."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.distribution import Distribution, merged
from cluster.gateway_report import GatewayReport
from cluster.ray_dashboard import PoolTarget
from cluster.scaling import DECODE, EXPERTS, GATEWAY, KINDS, PARTNERS, PREFILL, PoolReading
from cluster.view import DRAINING, READY, STARTING, Member, View
from decode.messages import NodeReport
from experts.messages import ShardReport

BUSY_WINDOW_S = 6.0
LATENCY_WINDOW_S = 15.0
UNMENDED_WINDOW_S = 60.0  # in which moving experts would have begun to mend what it can
LATENCIES_MIN = 5  # before a quantile says anything
QUANTILE = 0.9


@dataclass(slots=True)
class Work:
    """What one member had done by each look of late: (when, busy seconds, tokens or slots)."""

    looks: deque[tuple[float, float, int]] = field(default_factory=deque)

    def look(self, now_s: float, busy_s: float, tokens_count: int) -> None:
        """Note where its counts stand; a member that began anew has no past."""
        if self.looks and (busy_s < self.looks[-1][1] or tokens_count < self.looks[-1][2]):
            self.looks.clear()
        self.looks.append((now_s, busy_s, tokens_count))
        forget(self.looks, now_s - BUSY_WINDOW_S)

    @property
    def busy_share(self) -> float | None:
        """Share of the time of late in which it computed; None before there is a while to look at."""
        passed_s = self.looks[-1][0] - self.looks[0][0]
        return min((self.looks[-1][1] - self.looks[0][1]) / passed_s, 1.0) if passed_s > 0 else None

    @property
    def computed(self) -> tuple[float, int]:
        """Busy seconds, and tokens in them."""
        return self.looks[-1][1] - self.looks[0][1], self.looks[-1][2] - self.looks[0][2]


class Latencies:
    """A distribution as each gateway tells it of all time, seen over a short while."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, dict[str, Distribution]]] = deque()

    def look(self, now_s: float, by_gateway: dict[str, Distribution]) -> float | None:
        """What nine in ten did not exceed of late; None of few."""
        self._looks.append((now_s, by_gateway))
        forget(self._looks, now_s - LATENCY_WINDOW_S)
        before = self._looks[0][1]
        late = merged(now.since(before.get(name, now)) for name, now in by_gateway.items())
        return late.quantile(QUANTILE) if late.count >= LATENCIES_MIN else None


class PoolReadings:
    """Reads all pools at each look; a node's speed is remembered while nothing is computed."""

    def __init__(self, decode_requests_max: int):
        self._decode_requests_max = decode_requests_max
        self._work: dict[str, Work] = {}
        self._tokens_per_s: float | None = None
        self._full_s = -math.inf  # when requests last waited for pages, and not for prefill
        self._first_token = Latencies()
        self._inter_token = Latencies()
        self._slowness: deque[tuple[float, float]] = deque()

    def read(
        self, view: View, targets: Mapping[str, PoolTarget], slowness: float | None, now_s: float
    ) -> tuple[PoolReading, ...]:
        """One reading for each pool that Serve has; `slowness` is the experts', None while they move."""
        self._measure(view, now_s)
        self._note_slowness(slowness, now_s)
        gateways = {member.name: member.report for member in view.of_kind(GATEWAY)}
        reports = {name: report for name, report in gateways.items() if isinstance(report, GatewayReport)}
        latencies_s = (
            self._first_token.look(now_s, {name: one.time_to_first_token_s for name, one in reports.items()}),
            self._inter_token.look(now_s, {name: one.inter_token_s for name, one in reports.items()}),
        )
        is_heard = bool(reports) and len(reports) == len(gateways)
        return tuple(
            self._read(kind, view, targets, list(reports.values()), is_heard, latencies_s, now_s)
            for kind in KINDS
            if kind in targets
        )

    def _read(
        self,
        kind: str,
        view: View,
        targets: Mapping[str, PoolTarget],
        gateways: Sequence[GatewayReport],
        is_heard: bool,
        latencies_s: tuple[float | None, float | None],
        now_s: float,
    ) -> PoolReading:
        ready = staying(view, kind)
        reports = [one.report for one in ready if isinstance(one.report, NodeReport | ShardReport)]
        first_token_s, inter_token_s = latencies_s
        numbers = {}
        if kind == PREFILL:
            numbers = self._of_prefill(view, ready, reports, gateways, now_s)
            is_its_own = now_s - self._full_s > LATENCY_WINDOW_S
            numbers["time_to_first_token_s"] = first_token_s if is_its_own else None
        elif kind == DECODE:
            numbers = self._of_decode(reports, gateways)
            numbers["inter_token_s"] = inter_token_s
        elif kind == EXPERTS:
            shares = [self._busy_share(one) for one in ready]
            numbers = {"busy_share": None if None in shares else max(shares, default=None)}
            numbers["slowness"] = self._slowness_unmended
        counts = counts_of(kind, view, targets, len(ready))
        is_speed_known = bool(numbers.get("tokens_per_s")) or not numbers.get("tokens_waiting_count")
        is_complete = is_heard and is_speed_known and len(reports) == len(ready)
        return PoolReading(kind, now_s, *counts, is_complete, **numbers)

    def _of_prefill(
        self,
        view: View,
        ready: Sequence[Member],
        reports: Sequence[NodeReport],
        gateways: Sequence[GatewayReport],
        now_s: float,
    ) -> dict[str, float | int | None]:
        """Prompts at gateways count unless it is for decode that they wait."""
        shares = [share for one in ready if (share := self._busy_share(one)) is not None]
        decode = [one.report for one in staying(view, DECODE) if isinstance(one.report, NodeReport)]
        available_count = sum(report.pages_free_count + report.pages_cached_count for report in decode)
        is_room = sum(one.pages_waiting_count for one in gateways) <= available_count
        is_its_own = is_room or is_held_up_by_prefill(decode)
        self._full_s = self._full_s if is_its_own else now_s
        at_gateways_count = sum(one.prompt_tokens_waiting_count for one in gateways) if is_its_own else 0
        return {
            "requests_count": sum(one.requests_count for one in reports),
            "tokens_waiting_count": at_gateways_count + sum(one.tokens_waiting_count for one in reports),
            "tokens_per_s": self._tokens_per_s,
            "busy_share": sum(shares) / len(shares) if shares else None,
        }

    def _of_decode(
        self, reports: Sequence[NodeReport], gateways: Sequence[GatewayReport]
    ) -> dict[str, float | int | None]:
        """Pages that wait for prefill are no reason for more decode nodes, nor is who waits behind them."""
        on_nodes_count = sum(one.requests_count for one in reports)
        is_its_own = not is_held_up_by_prefill(reports)
        return {
            "requests_count": on_nodes_count + sum(one.requests_waiting_count for one in gateways),
            "requests_max_count": len(reports) * self._decode_requests_max,
            "pages_total_count": sum(one.pages_total_count for one in reports),
            "pages_leased_count": sum(one.pages_leased_count - one.pages_arriving_count for one in reports),
            "pages_awaited_count": sum(one.pages_waiting_count for one in gateways) if is_its_own else 0,
        }

    def _measure(self, view: View, now_s: float) -> None:
        """Note each member's work, and how fast prefill nodes were while they computed."""
        self._work = {one.name: self._work[one.name] for one in view.members if one.name in self._work}
        for member in view.members:
            match member.report:
                case NodeReport(busy_s=busy_s, tokens_count=done_count):
                    self._work.setdefault(member.name, Work()).look(now_s, busy_s, done_count)
                case ShardReport(busy_s=busy_s, slots_count=done_count):
                    self._work.setdefault(member.name, Work()).look(now_s, busy_s, done_count)
        nodes = [self._work[one.name].computed for one in view.of_kind(PREFILL) if one.name in self._work]
        busy_s, tokens_count = sum(one[0] for one in nodes), sum(one[1] for one in nodes)
        if busy_s > 0 and tokens_count > 0:
            self._tokens_per_s = tokens_count / busy_s

    def _busy_share(self, member: Member) -> float | None:
        work = self._work.get(member.name)
        return work.busy_share if work is not None else None

    def _note_slowness(self, slowness: float | None, now_s: float) -> None:
        if slowness is None:
            self._slowness.clear()
            return
        self._slowness.append((now_s, slowness))
        forget(self._slowness, now_s - UNMENDED_WINDOW_S)

    @property
    def _slowness_unmended(self) -> float | None:
        """The least of a minute, which no move has mended in that time; None before it is over."""
        if not self._slowness or self._slowness[-1][0] - self._slowness[0][0] < UNMENDED_WINDOW_S:
            return None
        return min(value for _, value in self._slowness)


def forget(looks: deque[tuple], until_s: float) -> None:
    """Drop looks that are older than the last one at or before a moment, which a window begins with."""
    while len(looks) > 2 and looks[1][0] <= until_s:
        looks.popleft()


def staying(view: View, kind: str) -> list[Member]:
    """Members that serve as a kind and are to go on doing so."""
    return [one for one in view.of_kind(kind) if one.state == READY and one.name not in view.roles]


def is_held_up_by_prefill(decode: Sequence[NodeReport]) -> bool:
    """Whether most pages on decode nodes wait for latents: then prefill is behind, and not decode."""
    arriving_count = sum(report.pages_arriving_count for report in decode)
    return arriving_count > sum(report.pages_leased_count for report in decode) - arriving_count


def counts_of(
    kind: str, view: View, targets: Mapping[str, PoolTarget], ready_count: int
) -> tuple[int, int, int, int, int]:
    """Of one pool: actors aimed at, nodes ready, starting and draining, and actors lent to its partner."""
    target, partner = targets[kind], PARTNERS.get(kind, "")
    lent_count = lent_of(kind, view)
    nodes_count = target.target_count - lent_count + (lent_of(partner, view) if partner else 0)
    starting = [one for one in view.of_kind(kind) if one.state == STARTING]
    draining = [one for one in view.of_kind(kind) if one.state == DRAINING or one.name in view.roles]
    starting_count = max(len(starting), target.starting_count, nodes_count - ready_count)
    draining_count = max(len(draining), target.stopping_count)
    return target.target_count, ready_count, starting_count, draining_count, lent_count


def lent_of(kind: str, view: View) -> int:
    """Actors of a pool that serve as another kind, or were asked to; not those that serve as both."""
    at_home = {(one.host, one.pid) for one in view.of_kind(kind) if one.name not in view.roles}
    away = {
        (one.host, one.pid)
        for one in view.members
        if (one.pool or one.kind) == kind and (view.roles.get(one.name, one.kind) != kind)
    }
    return len(away - at_home)
