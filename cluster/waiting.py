"""The requests that no node has taken: those whose turn is to come, and those that rest after a failure."""

import bisect
from collections.abc import Iterator

from cluster.route import Phase, Route


class WaitingRequests:
    """In the order of their turns; who rests has no turn until it has rested."""

    def __init__(self) -> None:
        self._turns: list[tuple[float, int, str]] = []
        self._rests: dict[str, float] = {}  # request id: when it joins the others

    @property
    def count(self) -> int:
        """Of both."""
        return len(self._turns) + len(self._rests)

    def add(self, route: Route) -> None:
        """A request waits for its turn."""
        route.phase = Phase.WAITING
        bisect.insort(self._turns, route.turn)

    def rest(self, route: Route, end_s: float) -> None:
        """A request waits until it may wait for its turn."""
        route.phase = Phase.WAITING
        self._rests[route.request.request_id] = end_s

    def remove(self, route: Route) -> None:
        """A request waits no more."""
        if self._rests.pop(route.request.request_id, None) is None:
            del self._turns[bisect.bisect_left(self._turns, route.turn)]

    def wake(self, now_s: float) -> Iterator[str]:
        """Ids of requests that have rested: they are to be added again."""
        for request_id in [request_id for request_id, end_s in self._rests.items() if end_s <= now_s]:
            del self._rests[request_id]
            yield request_id

    def at(self, place: int) -> str | None:
        """Id of the request whose turn comes after so many others, if there is one."""
        return self._turns[place][-1] if place < len(self._turns) else None
