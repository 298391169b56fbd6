"""Which node a request goes to: pure functions of what the router knows about the nodes."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from decode.messages import NodeReport
from kernels.model.pages import PAGE_TOKENS, pages_for


@dataclass
class NodeView:
    """What a router knows of one node: its last report, and what this router has sent there since."""

    name: str
    kind: str
    is_draining: bool = False
    is_silent: bool = False
    report: NodeReport | None = None
    requests_count: int = 0
    """This router's requests on the node."""
    tokens_sent_count: int = 0
    """Prompt tokens of this router that the node has not finished."""
    pages_available_count: int = 0
    """Pages that could be reserved, as far as known: reports and refusals set it, reservations come off."""
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    @property
    def is_known(self) -> bool:
        """Whether the node has told its numbers."""
        return self.report is not None

    @property
    def is_ready(self) -> bool:
        """Whether requests may go there."""
        return self.is_known and not self.is_draining and not self.is_silent

    @property
    def pages_total_count(self) -> int:
        """Pages of the node, used or not; 0 before the first report."""
        return self.report.pages_total_count if self.report else 0

    @property
    def tokens_waiting_count(self) -> int:
        """Prompt tokens before the node, ours and, by its report, those of others."""
        return max(self.tokens_sent_count, self.report.tokens_waiting_count if self.report else 0)

    @property
    def load(self) -> int:
        """Requests on the node, ours and, by its report, those of others."""
        if self.report is None:
            return self.requests_count
        reported_count = self.report.requests_count
        return max(self.requests_count, reported_count)

    def remember_prefix(self, hashes: Sequence[bytes]) -> None:
        """Note that the node will have these pages; it cannot have more than its pool holds."""
        for digest in hashes:
            self.prefixes[digest] = None
            self.prefixes.move_to_end(digest)
        while len(self.prefixes) > self.pages_total_count:
            self.prefixes.popitem(last=False)

    def cached_tokens_count(self, hashes: Sequence[bytes]) -> int:
        """Tokens of a prompt's beginning that the node probably has in pages."""
        known_count = 0
        while known_count < len(hashes) and hashes[known_count] in self.prefixes:
            known_count += 1
        return known_count * PAGE_TOKENS


def choose_prefill(
    nodes: Iterable[NodeView], hashes: Sequence[bytes], tokens_count: int, avoids: Collection[str] = ()
) -> NodeView | None:
    """The prefill node with the fewest tokens between now and this prompt's end, its cached prefix taken off.

    A node in `avoids` is taken only if there is no other.
    """
    fitting = [
        node
        for node in nodes
        if node.kind == "prefill" and node.is_ready and node.pages_total_count >= pages_for(tokens_count)
    ]
    return min(
        fitting,
        key=lambda node: (
            node.name in avoids,
            node.tokens_waiting_count - node.cached_tokens_count(hashes),
            node.name,
        ),
        default=None,
    )


def choose_decode(
    nodes: Iterable[NodeView], pages_wanted_count: int, avoids: Collection[str] = ()
) -> NodeView | None:
    """The least loaded decode node that has the pages a request can ever need; of equals the emptiest.

    A node in `avoids` is taken only if there is no other.
    """
    fitting = [
        node
        for node in nodes
        if node.kind == "decode" and node.is_ready and node.pages_available_count >= pages_wanted_count
    ]
    return min(
        fitting,
        key=lambda node: (node.name in avoids, node.load, -node.pages_available_count, node.name),
        default=None,
    )


def choose_awaited(nodes: Iterable[NodeView], pages_wanted_count: int, before: str) -> NodeView | None:
    """The decode node to keep free for a request without room: as `before` if it can be, else the emptiest.

    It stays with its choice, since it is there that pages come free for it.
    """
    fitting = [
        node
        for node in nodes
        if node.kind == "decode" and node.is_ready and node.pages_total_count >= pages_wanted_count
    ]
    return max(
        fitting, key=lambda node: (node.name == before, node.pages_available_count, node.name), default=None
    )


def pages_largest_count(nodes: Iterable[NodeView], kind: str) -> int | None:
    """Pages of the largest node of a kind; None while there is none, or one that has not told its numbers."""
    of_kind = [node for node in nodes if node.kind == kind]
    if not of_kind or not all(node.is_known for node in of_kind):
        return None
    return max(node.pages_total_count for node in of_kind)
