"""Which requests take part in a node's next step: requests join and leave between steps."""

from collections import deque
from collections.abc import Iterable
from itertools import pairwise

from decode.request import DecodeRequest


class DecodeBatcher:
    """Requests in the order they became complete; at most `requests_max` run at once.

    Each has all the pages it can ever need, so none is ever put back.
    """

    def __init__(self, requests_max: int):
        self.requests_max = requests_max
        self._waiting: deque[DecodeRequest] = deque()
        self._running: list[DecodeRequest] = []
        self._suspects: list[DecodeRequest] = []

    @property
    def requests_waiting_count(self) -> int:
        """Complete requests that wait for a place."""
        return len(self._waiting)

    @property
    def requests_running_count(self) -> int:
        """Requests that have a place, whether the next step is for all of them or for one alone."""
        return len(self._running)

    def admit(self, requests: Iterable[DecodeRequest]) -> None:
        """Queue requests whose latents are all here."""
        self._waiting.extend(requests)

    def next_batch(self) -> list[DecodeRequest]:
        """The requests of the next step; empty when there is nothing to do."""
        while self._waiting and len(self._running) < self.requests_max:
            self._running.append(self._waiting.popleft())
        return [self._suspects.pop(0)] if self._suspects else list(self._running)

    def suspect(self, requests: Iterable[DecodeRequest]) -> None:
        """Have each take its next step alone: a step of all of them failed, and one of them may be why."""
        self._suspects = list(requests)

    def remove(self, requests: Iterable[DecodeRequest]) -> None:
        """Take requests out that ended or were cancelled."""
        gone = set(map(id, requests))
        self._suspects = [request for request in self._suspects if id(request) not in gone]
        self._running = [request for request in self._running if id(request) not in gone]
        self._waiting = deque(request for request in self._waiting if id(request) not in gone)

    def everyone(self) -> list[DecodeRequest]:
        """Running and waiting requests."""
        return [*self._running, *self._waiting]


def split_evenly(batch: list[DecodeRequest], parts_count: int, size_min: int) -> list[list[DecodeRequest]]:
    """A batch in up to `parts_count` near equal parts, none smaller than `size_min` unless it is alone."""
    parts_count = max(min(parts_count, len(batch) // size_min), 1)
    borders = [len(batch) * part // parts_count for part in range(parts_count + 1)]
    return [batch[begin:end] for begin, end in pairwise(borders)]
