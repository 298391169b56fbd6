"""Prefill and decode pools as queues, in fake time, so that the real autoscaler has something to scale."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from cluster.autoscaler import Autoscaler
from cluster.scaling import ChangeRole, PoolReading, ScalePool

STEP_S = 0.1
LOOK_STEPS = 10
PREFILL_TOKENS_PER_S = 4000.0
PAGES_COUNT = 400  # of a decode node
PAGE_TOKENS = 64
REQUESTS_MAX = 32
INTER_TOKEN_S = 0.02


@dataclass(slots=True)
class Request:
    """One request on its way."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    left: float = 0.0
    first_token_s: float = math.inf

    @property
    def pages_count(self) -> int:
        """With all that it may ever need."""
        return math.ceil((self.prompt_tokens + self.output_tokens) / PAGE_TOKENS)


@dataclass(slots=True)
class SimulatedPool:
    """Counts of one pool; `arriving_s` are the times at which nodes will be ready."""

    target_count: int
    ready_count: int
    lent_count: int = 0
    arriving_s: list[float] = field(default_factory=list)


class SimulatedCluster:
    """Requests wait for pages, then for prefill, then decode: a step at a time."""

    def __init__(self, autoscaler: Autoscaler, start_s: float, role_change_s: float, seed: int = 0):
        self.now_s = 0.0
        self.autoscaler = autoscaler
        self.random = Random(seed)
        self.counts: list[tuple[float, int, int]] = []
        self.commands: list[tuple[float, ScalePool | ChangeRole]] = []
        self.done: list[Request] = []
        self.pools = {
            one.kind: SimulatedPool(one.count, one.count)
            for one in autoscaler.config.pools
            if one.kind in ("prefill", "decode")
        }
        self._start_s, self._role_change_s = start_s, role_change_s
        autoscaler.timed(start_s, role_change_s)
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._decoding: list[Request] = []
        self._busy: deque[float] = deque(maxlen=60)
        self._first_tokens: deque[tuple[float, float]] = deque()

    def run(self, end_s: float, requests_per_s: Callable[[float], float]) -> None:
        """Go on until a time, under a load that depends on it."""
        steps_count = round((end_s - self.now_s) / STEP_S)
        for step in range(steps_count):
            self._arrive(requests_per_s(self.now_s))
            self._nodes_begin()
            self._prefill(self._place())
            self._decode()
            if step % LOOK_STEPS == 0:
                self._look()
            self.now_s += STEP_S

    def _arrive(self, requests_per_s: float) -> None:
        while self.random.random() < requests_per_s * STEP_S / (1 + requests_per_s * STEP_S):
            prompt = min(int(self.random.lognormvariate(6.3, 0.8)), 8000)
            output = min(1 + int(self.random.lognormvariate(4.5, 0.8)), 1000)
            self._waiting.append(Request(self.now_s, prompt, output, float(prompt)))

    def _nodes_begin(self) -> None:
        for pool in self.pools.values():
            pool.ready_count += sum(at_s <= self.now_s for at_s in pool.arriving_s)
            pool.arriving_s = [at_s for at_s in pool.arriving_s if at_s > self.now_s]

    def _place(self) -> int:
        """Give waiting requests their pages; how many pages are taken then."""
        total = self.pools["decode"].ready_count * PAGES_COUNT
        taken = sum(one.pages_count for one in (*self._decoding, *self._prefilling))
        while self._waiting and taken + self._waiting[0].pages_count <= total:
            taken += self._waiting[0].pages_count
            self._prefilling.append(self._waiting.popleft())
        return taken

    def _prefill(self, _: int) -> None:
        room = budget = self.pools["prefill"].ready_count * PREFILL_TOKENS_PER_S * STEP_S
        while self._prefilling and room > 0:
            request = self._prefilling[0]
            part = min(request.left, room)
            request.left -= part
            room -= part
            if request.left <= 0:
                self._prefilling.popleft()
                request.first_token_s = self.now_s - request.arrived_s
                request.left = request.output_tokens
                self._first_tokens.append((self.now_s, request.first_token_s))
                self._decoding.append(request)
        self._busy.append(1 - room / budget if budget else 0.0)

    def _decode(self) -> None:
        places = self.pools["decode"].ready_count * REQUESTS_MAX
        for request in self._decoding[:places]:
            request.left -= STEP_S / INTER_TOKEN_S
        self.done += [request for request in self._decoding if request.left <= 0]
        self._decoding = [request for request in self._decoding if request.left > 0]

    def _look(self) -> None:
        while self._first_tokens and self._first_tokens[0][0] < self.now_s - 15:
            self._first_tokens.popleft()
        for command in self.autoscaler.decide(list(self.readings()), self.now_s):
            self.commands.append((self.now_s, command))
            self._obey(command)
        prefill, decode = self.pools["prefill"], self.pools["decode"]
        self.counts.append((self.now_s, prefill.ready_count, decode.ready_count))

    def readings(self) -> Iterator[PoolReading]:
        """Both pools as they stand."""
        prefill, decode = self.pools["prefill"], self.pools["decode"]
        waits = sorted(wait_s for _, wait_s in self._first_tokens)
        tokens_count = int(sum(one.left for one in self._prefilling))
        yield PoolReading(
            "prefill",
            self.now_s,
            *self._counts(prefill, decode),
            requests_count=len(self._prefilling),
            tokens_waiting_count=tokens_count,
            tokens_per_s=PREFILL_TOKENS_PER_S,
            busy_share=sum(self._busy) / max(len(self._busy), 1),
            time_to_first_token_s=waits[int(0.9 * len(waits))] if len(waits) >= 5 else None,
        )
        yield PoolReading(
            "decode",
            self.now_s,
            *self._counts(decode, prefill),
            requests_count=len(self._decoding) + len(self._waiting),
            requests_max_count=decode.ready_count * REQUESTS_MAX,
            inter_token_s=INTER_TOKEN_S,
            pages_total_count=decode.ready_count * PAGES_COUNT,
            pages_leased_count=sum(one.pages_count for one in (*self._decoding, *self._prefilling)),
            pages_awaited_count=sum(one.pages_count for one in self._waiting),
        )

    def _counts(self, pool: SimulatedPool, partner: SimulatedPool) -> tuple[int, int, int, int, int]:
        return pool.target_count, pool.ready_count, len(pool.arriving_s), 0, pool.lent_count

    def _obey(self, command: ScalePool | ChangeRole) -> None:
        match command:
            case ScalePool(kind, count):
                pool = self.pools[kind]
                pool.arriving_s += [self.now_s + self._start_s] * max(count - pool.target_count, 0)
                pool.ready_count -= max(pool.target_count - count, 0)
                pool.target_count = count
            case ChangeRole(from_kind, to_kind):
                lender, to = self.pools[from_kind], self.pools[to_kind]
                lender.ready_count -= 1
                to.arriving_s.append(self.now_s + self._role_change_s)
                if to.lent_count:
                    to.lent_count -= 1
                else:
                    lender.lent_count += 1

    def goodput(self, offered_until_s: float, time_to_first_token_s: float) -> int:
        """Finished requests that arrived until a time and had their first token soon enough."""
        return sum(
            one.first_token_s <= time_to_first_token_s and one.arrived_s <= offered_until_s
            for one in self.done
        )
