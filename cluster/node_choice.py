"""Which node a request goes to: pure functions of what the router knows about the nodes."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from decode.messages import NodeReport
from kernels.model.pages import PAGE_TOKENS

PREFIXES_REMEMBERED_MAX = 4096


@dataclass
class NodeView:
    """What a router knows of one node: its last report, and what this router has sent there since."""

    name: str
    kind: str
    address: str
    is_draining: bool = False
    report: NodeReport | None = None
    requests_count: int = 0
    """This router's requests on the node."""
    tokens_sent_count: int = 0
    """Prompt tokens of this router that the node has not finished."""
    pages_available_count: int | None = None
    """Pages that could be reserved, as far as known; None before the first report."""
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    @property
    def tokens_waiting_count(self) -> int:
        """Prompt tokens before the node, ours and, by its report, those of others."""
        return max(self.tokens_sent_count, self.report.tokens_waiting_count if self.report else 0)

    @property
    def load(self) -> int:
        """Requests on the node, ours and, by its report, those of others."""
        reported = self.report.requests_running_count + self.report.requests_waiting_count if self.report else 0
        return max(self.requests_count, reported)

    def remember_prefix(self, hashes: Sequence[bytes]) -> None:
        """Note that the node will have these pages."""
        for digest in hashes:
            self.prefixes[digest] = None
            self.prefixes.move_to_end(digest)
        while len(self.prefixes) > PREFIXES_REMEMBERED_MAX:
            self.prefixes.popitem(last=False)

    def cached_tokens_count(self, hashes: Sequence[bytes]) -> int:
        """Tokens of a prompt's beginning that the node probably has in pages."""
        known = next((index for index, digest in enumerate(hashes) if digest not in self.prefixes), len(hashes))
        return known * PAGE_TOKENS


def choose_prefill(nodes: Iterable[NodeView], hashes: Sequence[bytes]) -> NodeView | None:
    """The prefill node with the fewest tokens between now and this prompt's end, its cached prefix taken off."""
    ready = [node for node in nodes if node.kind == "prefill" and not node.is_draining]
    return min(
        ready,
        key=lambda node: (node.tokens_waiting_count - node.cached_tokens_count(hashes), node.name),
        default=None,
    )


def choose_decode(nodes: Iterable[NodeView], pages_wanted_count: int) -> NodeView | None:
    """The least loaded decode node that has the pages a request can ever need; of equals the emptiest."""
    ready = [
        node
        for node in nodes
        if node.kind == "decode" and not node.is_draining and (node.pages_available_count or 0) >= pages_wanted_count
    ]
    return min(ready, key=lambda node: (node.load, -(node.pages_available_count or 0), node.name), default=None)
