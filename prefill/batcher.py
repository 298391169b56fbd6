"""Which tokens of which prompts go into a node's next step."""

from bisect import insort
from collections.abc import Callable

from kernels.model.pages import PAGE_TOKENS
from prefill.request import Chunk, PrefillRequest


class PrefillBatcher:
    """Prompts under way, cut into chunks at page borders under a budget of tokens.

    Every prompt under way gets an equal share of each step, and what short ones leave goes to the oldest.
    Where there are more prompts than pages in a step, the oldest has a share in each, the others take turns.
    So a long prompt does not hold up short ones, nor many short ones a long one.
    """

    def __init__(self, step_tokens_max: int, requests_max: int):
        self.step_tokens_max = max(step_tokens_max, PAGE_TOKENS)
        self.requests_max = requests_max
        self._waiting: list[PrefillRequest] = []
        self._running: list[PrefillRequest] = []  # oldest first
        self._suspects: list[PrefillRequest] = []
        self._steps_count = 0

    @property
    def requests_waiting_count(self) -> int:
        """Prompts that have no pages yet."""
        return len(self._waiting)

    @property
    def requests_running_count(self) -> int:
        """Prompts under way."""
        return len(self._running)

    @property
    def has_suspects(self) -> bool:
        """Whether prompts are still to step alone."""
        return bool(self._suspects)

    @property
    def tokens_waiting_count(self) -> int:
        """Tokens still to be computed, of all prompts."""
        return sum(request.tokens_left_count for request in self.everyone())

    def add(self, request: PrefillRequest) -> None:
        """Queue a prompt: the older first, priority counted as age."""
        insort(self._waiting, request, key=lambda waiting: waiting.turn_s)

    def next_waiting(self) -> PrefillRequest | None:
        """The prompt to begin next, if there is a place for it."""
        return self._waiting[0] if self._waiting and len(self._running) < self.requests_max else None

    def begin(self, request: PrefillRequest) -> None:
        """Move a prompt that now has its pages from waiting to under way."""
        self._waiting.remove(request)
        self._running.append(request)
        request.last_step = self._steps_count  # its turn comes after those that were here

    def next_batch(self, may_go: Callable[[PrefillRequest], bool] = lambda request: True) -> list[Chunk]:
        """Chunks of the next step, oldest prompt first; empty when there is nothing to do.

        Prompts that may not go have no share in it, and lose none of their turn.
        """
        in_line = self._in_line([request for request in self._running if may_go(request)])
        if (alone := next((request for request in self._suspects if may_go(request)), None)) is not None:
            self._suspects.remove(alone)
            in_line = [alone]
        elif self._suspects:
            in_line = [request for request in in_line if request not in self._suspects]
        shares = self._shares([request.tokens_left_count for request in in_line])
        return [
            Chunk(request, request.tokens_done_count, request.tokens_done_count + share)
            for request, share in zip(in_line, shares, strict=True)
            if share
        ]

    def suspect(self, chunks: list[Chunk]) -> None:
        """Have each prompt take its next step alone: a step of all of them failed, and one may be why."""
        self._suspects = [chunk.request for chunk in chunks]

    def finish(self, chunks: list[Chunk]) -> None:
        """Note that chunks were computed; the prompts that are complete with them leave."""
        self._steps_count += 1
        for chunk in chunks:
            chunk.request.tokens_done_count = chunk.end
            chunk.request.last_step = self._steps_count
        self._running = [request for request in self._running if request.tokens_left_count]

    def remove(self, request: PrefillRequest) -> None:
        """Take a prompt out that was cancelled or failed."""
        for queue in (self._waiting, self._running, self._suspects):
            if request in queue:
                queue.remove(request)

    def everyone(self) -> list[PrefillRequest]:
        """Prompts under way and waiting."""
        return [*self._running, *self._waiting]

    def _in_line(self, ready: list[PrefillRequest]) -> list[PrefillRequest]:
        """Prompts that may go: the oldest, then those whose last share is longest ago."""
        pages_max = self.step_tokens_max // PAGE_TOKENS
        if len(ready) <= pages_max:
            return ready
        oldest = ready[: min(pages_max - 1, 1)]
        return oldest + sorted(ready[len(oldest) :], key=lambda request: request.last_step)

    def _shares(self, lefts: list[int]) -> list[int]:
        """Tokens of the next step for prompts with so many left: whole pages, or all that is left of one."""
        pages_max = self.step_tokens_max // PAGE_TOKENS
        fair = pages_max // max(min(len(lefts), pages_max), 1) * PAGE_TOKENS
        shares = [min(left, fair) for left in lefts[:pages_max]] + [0] * (len(lefts) - pages_max)
        room = self.step_tokens_max - sum(shares)
        for index, left in enumerate(lefts):
            more = min(left - shares[index], room)
            if more < left - shares[index]:
                more -= more % PAGE_TOKENS
            shares[index] += more
            room -= more
        return shares
