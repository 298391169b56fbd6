"""Which tokens of which prompts go into a node's next step."""

from bisect import insort

from kernels.model.pages import PAGE_TOKENS
from prefill.request import Chunk, PrefillRequest


class PrefillBatcher:
    """Prompts under way, cut into chunks at page borders under a budget of tokens.

    Every prompt under way gets an equal share of each step, and what short ones leave goes to the first in
    line: so a long prompt does not hold up short ones, nor many short ones a long one. Where there are more
    prompts than pages in a step, those that had no share move to the front of the line.
    """

    def __init__(self, step_tokens_max: int, requests_max: int):
        self.step_tokens_max = max(step_tokens_max, PAGE_TOKENS)
        self.requests_max = requests_max
        self._waiting: list[PrefillRequest] = []
        self._running: list[PrefillRequest] = []

    @property
    def requests_waiting_count(self) -> int:
        """Prompts that have no pages yet."""
        return len(self._waiting)

    @property
    def requests_running_count(self) -> int:
        """Prompts under way."""
        return len(self._running)

    @property
    def tokens_waiting_count(self) -> int:
        """Tokens still to be computed, of all prompts."""
        return sum(request.tokens_left_count for request in self.everyone())

    def add(self, request: PrefillRequest) -> None:
        """Queue a prompt: higher priority first, then the older."""
        insort(self._waiting, request, key=lambda waiting: -waiting.asked.priority)

    def next_waiting(self) -> PrefillRequest | None:
        """The prompt to begin next, if there is a place for it."""
        return self._waiting[0] if self._waiting and len(self._running) < self.requests_max else None

    def begin(self, request: PrefillRequest) -> None:
        """Move a prompt that now has its pages from waiting to under way."""
        self._waiting.remove(request)
        self._running.append(request)

    def next_batch(self) -> list[Chunk]:
        """Chunks of the next step, first in line first; empty when there is nothing to do."""
        shares = self._shares()
        taken = self._running[: len(shares)]
        return [
            Chunk(request, request.tokens_done_count, request.tokens_done_count + share)
            for request, share in zip(taken, shares, strict=True)
            if share
        ]

    def finish(self, chunks: list[Chunk]) -> list[PrefillRequest]:
        """Note that chunks were computed; the prompts that are complete with them leave."""
        for chunk in chunks:
            chunk.request.tokens_done_count = chunk.end
        complete = [chunk.request for chunk in chunks if chunk.is_last]
        served = {id(chunk.request) for chunk in chunks}
        left = [request for request in self._running if request.tokens_left_count]
        self._running = sorted(left, key=lambda request: id(request) in served)
        return complete

    def remove(self, request: PrefillRequest) -> None:
        """Take a prompt out that was cancelled or failed."""
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)

    def everyone(self) -> list[PrefillRequest]:
        """Prompts under way and waiting."""
        return [*self._running, *self._waiting]

    def _shares(self) -> list[int]:
        """Tokens of the next step for each of the first prompts: whole pages, or all that is left of one."""
        pages_max = self.step_tokens_max // PAGE_TOKENS
        taken = self._running[:pages_max]
        if not taken:
            return []
        fair = pages_max // len(taken) * PAGE_TOKENS
        shares = [min(request.tokens_left_count, fair) for request in taken]
        left = self.step_tokens_max - sum(shares)
        for index, request in enumerate(taken):
            more = min(request.tokens_left_count - shares[index], left)
            if more < request.tokens_left_count - shares[index]:
                more -= more % PAGE_TOKENS
            shares[index] += more
            left -= more
        return shares
