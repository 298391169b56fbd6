"""What nodes and shards say to each other, and the table that both go by.

dispatch  [call id, epoch, layer, tokens, expert ids, slots of each expert, traceparent]
                                                                             parts: hidden, token of each slot
combine   [call id]                                                          parts: outputs, slot after slot
refused   [call id, reason]
fetch     [call id, layer, expert]
weights   [call id, CRC-32 of all bytes]                                     parts: gate and up, down, scales
"""

from dataclasses import dataclass
from typing import Any

from kernels.transport.spans import UNTRACED, is_traceparent

DISPATCH, COMBINE, REFUSED = "dispatch", "combine", "refused"
FETCH, WEIGHTS = "fetch", "weights"

DISPATCH_BOUNDS_S = (
    *(5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4),
    *(1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 2e-2, 5e-2),
    *(0.1, 0.2, 0.5, 1.0, 3.0, 10.0, 30.0),
)
"""Between them dispatches are counted by how long they took."""


@dataclass(frozen=True)
class ShardAddress:
    """Where one shard listens."""

    name: str
    address: str
    host: str = ""
    weights_address: str = ""
    """For siblings that fetch experts."""


Homes = tuple[tuple[tuple[int, ...], ...], ...]
"""By MoE layer and expert: the shards that hold a replica, as ascending indices."""


@dataclass(frozen=True)
class Placement:
    """Which replicas of which expert sit on which shard; a later table has a higher epoch.

    `homes[layer - first_layer][expert]` are indices into `shards`.
    """

    epoch: int
    first_layer: int
    shards: tuple[ShardAddress, ...]
    homes: Homes

    def experts_of(self, name: str) -> list[tuple[int, int]]:
        """(layer, expert) pairs that the shard called `name` holds."""
        mine = {index for index, shard in enumerate(self.shards) if shard.name == name}
        layers = enumerate(self.homes, self.first_layer)
        return [
            (layer, expert)
            for layer, homes in layers
            for expert, home in enumerate(homes)
            if not mine.isdisjoint(home)
        ]


@dataclass(frozen=True)
class DispatchHeader:
    """The header of one dispatch; its slots go by expert, `slot_counts[i]` of them to `expert_ids[i]`."""

    call_id: int
    epoch: int
    layer: int
    tokens_count: int
    expert_ids: tuple[int, ...]
    slot_counts: tuple[int, ...]
    traceparent: str = UNTRACED
    """Place of the dispatch in the trace of one of its requests."""

    @property
    def slots_count(self) -> int:
        """Token and expert pairs in this dispatch."""
        return sum(self.slot_counts)

    def body(self) -> list[Any]:
        """The header as it travels."""
        numbers = (self.call_id, self.epoch, self.layer, self.tokens_count)
        return [*numbers, self.expert_ids, self.slot_counts, self.traceparent]

    @staticmethod
    def from_body(body: Any) -> "DispatchHeader":
        """Read a header that has travelled; raises ValueError for one that is not of this form."""
        match body:
            case [call_id, epoch, layer, tokens_count, [_, *_] as experts, list() as counts, str() as traced]:
                at_least_0, at_least_1 = (call_id, epoch, layer, *experts), (tokens_count, *counts)
                whole = all(type(number) is int for number in at_least_0 + at_least_1)
                paired = len(experts) == len(counts) and len(set(experts)) == len(experts)
                known = traced == UNTRACED or is_traceparent(traced)
                if whole and paired and known and min(at_least_0) >= 0 and min(at_least_1) >= 1:
                    slots = (tuple(experts), tuple(counts))
                    return DispatchHeader(call_id, epoch, layer, tokens_count, *slots, traced)
        raise ValueError("the header of a dispatch is malformed")


def read_fetch(body: Any) -> tuple[int, int, int]:
    """Call id, layer and expert of a fetch that has travelled; raises ValueError."""
    match body:
        case [int() as call_id, int() as layer, int() as expert]:
            return call_id, layer, expert
    raise ValueError("the header of a fetch is malformed")


@dataclass(frozen=True)
class ShardReport:
    """Numbers that a shard returns about itself."""

    name: str
    address: str
    epoch: int
    experts_count: int
    dispatches_count: int
    slots_count: int
    refused_count: int
    fetched_count: int
    """Experts that came from siblings since the shard began; the others came from the checkpoint."""
    load: bytes
    """Slots computed for each MoE layer and expert since the shard began, as `ExpertLoad.told` gives them."""
    busy_s: float = 0.0
    """Seconds spent computing."""
    weights_address: str = ""


@dataclass(frozen=True)
class DispatchReport:
    """Numbers about a node's dispatches since it began, as the node sees them."""

    counts: tuple[int, ...] = (0,) * (len(DISPATCH_BOUNDS_S) + 1)
    """Answered dispatches, of one layer each, by time from dispatch to the last answer."""
    took_s: float = 0.0
    """Those times together; shared experts and the other micro-batch compute meanwhile."""
    waited_s: float = 0.0
    """Of that, seconds in which the node had nothing else to do."""
    retries_count: int = 0
    given_up_count: int = 0
    """Dispatches that no shard answered in the time allowed."""
