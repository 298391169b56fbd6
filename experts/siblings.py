"""Weights of experts from other shards that hold them: nearer than a checkpoint on a shared disk.

They travel between hosts, at an address of their own, in a thread of its own: dispatches wait for none of it.
"""

import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch

from experts.config import ShardConfig
from experts.messages import FETCH, REFUSED, WEIGHTS, Placement, read_fetch
from experts.weights import ExpertFormat, ExpertWeights
from kernels.model.host_copies import HostCopies
from kernels.ops.expert_mlp import GatedWeights
from kernels.transport.connect import connect
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError, FrameMalformed
from kernels.transport.frame import Frame, Header
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import as_bytes

CONNECT_TIMEOUT_S = 0.5  # a sibling that has died costs so long, once
FETCH_TIMEOUT_S = 5.0
REST = 6.0  # times as long as a fetch took: both shards compute for nodes meanwhile, and cores may be few
REST_S_MAX = 0.25


def sources_of(
    experts: Iterable[tuple[int, int]], placement: Placement, names: Set[str]
) -> dict[tuple[int, int], list[str]]:
    """Where those shards called `names` that hold each of some (layer, expert) pairs give weights."""
    first_layer = placement.first_layer
    return {
        (layer, expert): [
            placement.shards[home].weights_address
            for home in placement.homes[layer - first_layer][expert]
            if placement.shards[home].name in names
        ]
        for layer, expert in experts
    }


def checksum(parts: Sequence[memoryview]) -> int:
    """CRC-32 over all bytes, in order."""
    total = 0
    for part in parts:
        total = zlib.crc32(part, total)
    return total


def are_numbers(part: torch.Tensor) -> bool:
    """Whether a tensor holds neither infinity nor NaN; FP8 E4M3 has no infinity, and two codes for NaN."""
    if part.dtype == torch.float8_e4m3fn:
        return not bool(((part.view(torch.uint8) & 0x7F) == 0x7F).any())
    return bool(part.isfinite().all())


class Giver:
    """Gives siblings the weights of experts that are here, one after the other."""

    def __init__(self, config: ShardConfig, find: Callable[[tuple[int, int]], GatedWeights | None]):
        """`find` looks up a (layer, expert) pair, in another thread than the one that computes."""
        self.endpoint = Endpoint(config.weights_address, config.secret, config.name, self._give)
        self._find = find
        self._copies = HostCopies()

    def _give(self, channel: StreamChannel, frame: Frame) -> None:
        if frame.kind != FETCH:
            raise FrameMalformed(f"{frame.kind!r:.40} is no fetch of an expert")
        try:
            fetch_id, layer, expert = read_fetch(frame.body)
        except ValueError as error:
            raise FrameMalformed(f"a fetch of no use: {error}") from error
        weights = self._find((layer, expert))
        if weights is None:
            channel.send(REFUSED, [fetch_id, f"expert {expert} of layer {layer} is not here"])
            return
        copies = [self._copies.begin(part) for part in weights.plain()]
        parts = [as_bytes(copy.wait()) for copy in copies]
        channel.send(WEIGHTS, [fetch_id, checksum(parts)], parts)


class Siblings:
    """Asks other shards for experts, one after the other; whoever fails once is not asked again."""

    def __init__(self, config: ShardConfig, expert_format: ExpertFormat, device: torch.device):
        self._config = config
        self._format = expert_format
        self._device = device
        self._channels: dict[str, StreamChannel | None] = {}
        self._fetch_ids = itertools.count(1)
        self._first_turn = zlib.crc32(config.name.encode())  # of several homes, not all ask the same

    def fetch(
        self,
        sources: Mapping[tuple[int, int], Sequence[str]],
        on_fetched: Callable[[int], None],
        may_rest: Callable[[], bool] = lambda: False,
    ) -> ExpertWeights:
        """What siblings give of some (layer, expert) pairs, each asked for at its addresses; maybe less.

        `on_fetched` is told after each how many there are. Between one and the next it rests if it may.
        """
        held: ExpertWeights = {}
        took_s = 0.0
        for turn, (pair, addresses) in enumerate(sources.items(), self._first_turn):
            if took_s and may_rest():
                time.sleep(min(REST * took_s, REST_S_MAX))
            begin_s = time.monotonic()
            for place in range(len(addresses)):
                weights = self._ask(addresses[(turn + place) % len(addresses)], *pair)
                if weights is not None:
                    held[pair] = weights
                    on_fetched(len(held))
                    break
            took_s = time.monotonic() - begin_s
        return held

    def close(self) -> None:
        """Let go of all siblings."""
        for channel in self._channels.values():
            if channel is not None:
                channel.close()
        self._channels.clear()

    def _ask(self, address: str, layer: int, expert: int) -> GatedWeights | None:
        fetch_id = next(self._fetch_ids)
        parts = [torch.empty(shape, dtype=dtype) for shape, dtype in self._format.parts]
        buffers = [as_bytes(part) for part in parts]

        def choose_buffers(header: Header) -> list[memoryview]:
            chosen = buffers if header.kind == WEIGHTS else []
            if header.kind not in (WEIGHTS, REFUSED) or header.payload_bytes != sum(map(len, chosen)):
                raise FrameMalformed(f"{header.kind!r:.40} answers no fetch of an expert")
            return chosen

        try:
            channel = self._channel(address)
            if channel is None:
                return None
            channel.send(FETCH, [fetch_id, layer, expert])
            channel.flush(FETCH_TIMEOUT_S)
            frame = channel.receive(FETCH_TIMEOUT_S, choose_buffers)
            if frame.kind == REFUSED:
                return None
            self._check(frame, fetch_id, parts, buffers)
        except ChannelError:
            self._give_up(address)
            return None
        return GatedWeights.of_plain([part.to(self._device) for part in parts])

    @staticmethod
    def _check(frame: Frame, fetch_id: int, parts: list[torch.Tensor], buffers: list[memoryview]) -> None:
        body: Any = frame.body
        if body != [fetch_id, checksum(buffers)] or not all(map(are_numbers, parts)):
            raise FrameMalformed("the weights that came are not those that were asked for")

    def _channel(self, address: str) -> StreamChannel | None:
        if address not in self._channels:
            self._channels[address] = None
            self._channels[address] = connect(
                address, self._config.secret, self._config.name, CONNECT_TIMEOUT_S
            )
        return self._channels[address]

    def _give_up(self, address: str) -> None:
        channel = self._channels.get(address)
        if channel is not None:
            channel.close()
        self._channels[address] = None
