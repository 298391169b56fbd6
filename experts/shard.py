"""One process that holds some experts and computes them for any node that asks."""

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from experts.busy import BusyTime
from experts.config import ShardConfig
from experts.errors import DispatchRefused
from experts.holding import Holding
from experts.load import ExpertLoad
from experts.messages import (
    COMBINE,
    DISPATCH,
    REFUSED,
    DispatchHeader,
    Placement,
    ShardReport,
)
from experts.siblings import Giver, Siblings, sources_of
from experts.weights import ExpertFormat, ExpertWeights, load_experts
from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.model.host_copies import HostCopies, brought, check_device
from kernels.ops.backend import runs_kernel
from kernels.ops.expert_mlp import GatedWeights, compile_expert_mlp, expert_mlp
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError, FrameMalformed
from kernels.transport.frame import Frame, Part
from kernels.transport.spans import SpanLog
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import as_bytes, as_tensor, from_bytes

logger = logging.getLogger(__name__)

IDLE_S = 0.5
AWAKE_S = 0.0002  # a shard that looks for longer takes a core that others on its host would compute on


@dataclass(slots=True)
class Dispatch:
    """A node's tokens, waiting for their experts."""

    channel: StreamChannel
    header: DispatchHeader
    hidden: torch.Tensor
    rows: torch.Tensor
    weights: list[GatedWeights]
    """Of its experts, taken on arrival: a placement adopted meanwhile changes nothing for it."""


class ExpertShard:
    """Some experts; dispatches of several nodes that wait for the same layer are computed together."""

    def __init__(
        self,
        config: ShardConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        """Experts are kept and computed on `device` in `dtype`, or on a GPU as the FP8 that they come in."""
        model = checkpoint.config
        self.config = config
        self.load = ExpertLoad(model.dense_layers_count, len(model.moe_layers), model.routed_experts_count)
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = torch.device(device)
        keeps_fp8 = runs_kernel(torch.empty(0, device=device))
        self._format = ExpertFormat.of(model, dtype, keeps_fp8)
        self._loading = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._copies = HostCopies()
        self._holding = Holding()
        self._compiled_count = 0
        self._arrived: list[Dispatch] = []
        self._dispatches_count = 0
        self._refused_count = 0
        self._fetched_count = 0
        self._busy = BusyTime(self._device)
        self.spans = SpanLog()
        self._endpoint = Endpoint(config.address, config.secret, config.name, self._take)
        self._giver = Giver(config, lambda pair: self._holding.get(pair))
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def address(self) -> str:
        """Where nodes connect."""
        return self._endpoint.address

    @property
    def weights_address(self) -> str:
        """Where siblings fetch experts."""
        return self._giver.endpoint.address

    @property
    def epoch(self) -> int:
        """Epoch of the newest placement that is loaded; 0 before the first."""
        return self._holding.epoch

    @property
    def is_alive(self) -> bool:
        """Whether its thread serves."""
        return self._thread is not None and self._thread.is_alive()

    def adopt(
        self,
        placement: Placement,
        on_progress: ProgressCallback | None = None,
        in_force: Placement | None = None,
        alive: Set[str] = frozenset(),
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        """Load what a newer placement gives this shard; the rest goes once nodes go by it. Any one thread.

        What shards called `alive`, also those that are to leave, hold by the placement `in_force` comes from
        them, the rest from the checkpoint. Progress is in experts, wherever they come from. Unless it is
        urgent, siblings are asked with rests on CPUs, on which they compute meanwhile.
        """
        before = self._holding
        if placement.epoch <= before.epoch:
            return
        held = before.leaving | before.experts
        wanted = placement.experts_of(self.config.name)
        missing = [expert for expert in wanted if expert not in held]
        others = alive - {self.config.name}
        sources = sources_of(missing, in_force, others) if in_force is not None else {}
        with torch.cuda.stream(self._loading):  # so that what is computed meanwhile does not wait
            loaded = self._loaded(missing, sources, on_progress, is_urgent)
            held |= loaded
            largest = largest_layer(wanted)
            if len(largest) > self._compiled_count:  # as after a death: kernels are compiled by that number
                self._compile_for([held[expert] for expert in largest])
                self._compiled_count = len(largest)
        if self._loading is not None:
            self._hand_over(loaded)
        experts = {expert: held.pop(expert) for expert in wanted}
        self._holding = Holding(placement.epoch, experts, leaving=held)

    def _loaded(
        self,
        missing: Sequence[tuple[int, int]],
        sources: dict[tuple[int, int], list[str]],
        on_progress: ProgressCallback | None,
        is_urgent: Callable[[], bool],
    ) -> ExpertWeights:
        """Experts on this shard's device, from siblings that give them, the rest from the checkpoint."""

        def tell(loaded_count: int) -> None:
            if on_progress is not None:
                on_progress(loaded_count, len(missing))

        held = self._fetched(sources, tell, is_urgent) if sources else {}
        rest = [expert for expert in missing if expert not in held]
        where = (self._device, self._format.is_fp8)
        loaded = load_experts(
            self._checkpoint, rest, self._dtype, lambda count, _: tell(len(held) + count), *where
        )
        return held | loaded

    def _compile_for(self, experts: Sequence[GatedWeights]) -> None:
        """Compile before any node waits: that takes as long as a shard may be silent."""
        if self._loading is None:
            return
        size = self._checkpoint.config.hidden_size
        compile_expert_mlp(experts, torch.zeros(1, size, dtype=self._dtype, device=self._device))

    def _hand_over(self, loaded: ExpertWeights) -> None:
        """Wait until experts are there; when dropped, their memory outlives what still computes them."""
        self._loading.synchronize()
        for weights in loaded.values():
            for part in weights.plain():
                part.record_stream(torch.cuda.current_stream(self._device))

    def _fetched(
        self,
        sources: dict[tuple[int, int], list[str]],
        on_fetched: Callable[[int], None],
        is_urgent: Callable[[], bool],
    ) -> ExpertWeights:
        siblings = Siblings(self.config, self._format, self._device)
        try:
            held = siblings.fetch(sources, on_fetched, lambda: self._device.type == "cpu" and not is_urgent())
        finally:
            siblings.close()
        self._fetched_count += len(held)
        return held

    def forget(self, epoch: int) -> None:
        """Let go of what only placements before `epoch` gave this shard: every node goes by that one."""
        holding = self._holding
        if epoch >= holding.epoch and holding.leaving:
            self._holding = Holding(holding.epoch, holding.experts)

    def start(self) -> None:
        """Serve nodes in a thread of its own, and siblings in another, until closed."""
        self._thread = threading.Thread(target=self._run, name=f"{self.config.name}-compute", daemon=True)
        self._thread.start()
        self._giver.endpoint.start()

    def step(self, timeout_s: float) -> int:
        """Take what comes within `timeout_s`, compute it layer by layer, and answer; how many dispatches."""
        self._endpoint.poll(timeout_s)
        arrived, self._arrived = self._arrived, []
        by_layer: dict[int, list[Dispatch]] = defaultdict(list)
        for dispatch in arrived:
            by_layer[dispatch.header.layer].append(dispatch)
        for layer, dispatches in by_layer.items():
            self._serve(layer, dispatches)
        return len(arrived)

    def report(self) -> ShardReport:
        """Numbers about this shard."""
        refused_peers_count = sum(
            one.counts.refused_peers_count for one in (self._endpoint, self._giver.endpoint)
        )
        return ShardReport(
            name=self.config.name,
            address=self.address,
            epoch=self.epoch,
            experts_count=len(self._holding.experts),
            dispatches_count=self._dispatches_count,
            slots_count=self.load.slots_count,
            fetched_count=self._fetched_count,
            refused_count=self._refused_count + refused_peers_count,
            load=self.load.told(),
            busy_s=self._busy.seconds,
            weights_address=self.weights_address,
        )

    def close(self) -> None:
        """Stop serving and free the address."""
        self._stopping = True
        self._endpoint.wake()
        if self._thread is not None:
            self._thread.join(timeout=5)
        for endpoint in (self._endpoint, self._giver.endpoint):
            endpoint.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._try_step()
        except RuntimeError:
            logger.exception("%s: its GPU has failed for good, and it leaves", self.config.name)
            self._endpoint.close()  # so that nodes see at once that nobody computes here

    def _try_step(self) -> None:
        try:
            self._step_awake()
        except Exception:
            logger.exception("%s: a step failed; nodes will ask again", self.config.name)
            check_device(self._device)

    def _step_awake(self) -> None:
        """Wait for dispatches: awake just after one, for the next is often close behind."""
        awake_end_s = time.monotonic() + AWAKE_S
        while not self.step(0) and not self._stopping:
            if time.monotonic() > awake_end_s:
                self.step(IDLE_S)
                return
            os.sched_yield()  # to whoever has something to compute, where processes are more than cores

    def _take(self, channel: StreamChannel, frame: Frame) -> None:
        """Put a node's dispatch with the others that wait, or refuse it."""
        if frame.kind != DISPATCH:
            raise FrameMalformed(f"a shard takes no {frame.kind!r:.40}")
        try:
            header = DispatchHeader.from_body(frame.body)
            hidden, rows = self._tensors(header, frame.parts)
        except ValueError as error:
            raise FrameMalformed(f"a dispatch of no use: {error}") from error
        try:
            weights = self._holding.weights_of(header)
        except DispatchRefused as refusal:
            self._refuse(channel, header, str(refusal))
        else:
            self._arrived.append(Dispatch(channel, header, hidden, rows, weights))

    def _tensors(self, header: DispatchHeader, parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[tokens, hidden]` and each slot's row among them `[slots]`; raises ValueError."""
        hidden, rows = parts
        size = self._checkpoint.config.hidden_size
        hidden = as_tensor(hidden, self._dtype, (header.tokens_count, size))
        rows = from_bytes(rows, torch.int32, (header.slots_count,))
        if rows.numpy().min() < 0 or rows.numpy().max() >= header.tokens_count:
            raise ValueError("a slot names a token that was not sent")
        return hidden, rows

    def _refuse(self, channel: StreamChannel, header: DispatchHeader, reason: str) -> None:
        self._refused_count += 1
        with self._answering(channel):
            channel.send(REFUSED, [header.call_id, reason])

    @contextmanager
    def _answering(self, channel: StreamChannel) -> Iterator[None]:
        """Whatever comes in between, others are answered too: who is not sees its channel end."""
        try:
            yield
        except ChannelError as error:
            logger.info("%s: %s did not wait for its answer: %s", self.config.name, channel.peer, error)
        except Exception:
            logger.exception("%s: %s could not be answered", self.config.name, channel.peer)
            channel.end()  # its endpoint closes it, which may wait for GPUs to let go
            check_device(self._device)

    def _serve(self, layer: int, dispatches: list[Dispatch]) -> None:
        self._dispatches_count += len(dispatches)
        begin_s = time.monotonic()
        try:
            with self._busy.measured():
                outputs = self._compute(layer, dispatches)
        except Exception:
            logger.exception("%s: layer %s could not be computed", self.config.name, layer)
            for dispatch in dispatches:
                self._refuse(dispatch.channel, dispatch.header, "the shard failed to compute it")
            check_device(self._device)
            return
        end_s = time.monotonic()
        for dispatch, output in zip(dispatches, outputs, strict=True):
            on_device = dispatch.channel.carries_tensors
            with self._answering(dispatch.channel):
                part = output if on_device else as_bytes(self._copies.begin(output).wait())
                dispatch.channel.send(COMBINE, [dispatch.header.call_id], [part])
            if dispatch.header.traceparent:
                self._note(dispatch.header, begin_s, end_s)

    def _note(self, header: DispatchHeader, begin_s: float, end_s: float) -> None:
        numbers = {"trivium.layer": header.layer, "trivium.slots_count": header.slots_count}
        self.spans.record("experts", header.traceparent, begin_s, end_s, **numbers)

    def _compute(self, layer: int, dispatches: list[Dispatch]) -> list[torch.Tensor]:
        if len(dispatches) > 1:
            return self._together(layer, dispatches)
        [dispatch] = dispatches
        header = dispatch.header
        self.load.add(layer, header.expert_ids, header.slot_counts)
        given = (brought([part], self._device) for part in (dispatch.hidden, dispatch.rows))
        return [expert_mlp(*given, dispatch.weights, header.slot_counts)]

    def _together(self, layer: int, dispatches: list[Dispatch]) -> list[torch.Tensor]:
        """Several nodes' slots merged by expert, so that each expert's weights are read once."""
        first_rows = torch.tensor(
            [0, *(dispatch.header.tokens_count for dispatch in dispatches[:-1])]
        ).cumsum(0)
        rows = torch.cat(
            [dispatch.rows + first for dispatch, first in zip(dispatches, first_rows, strict=True)]
        )
        experts = torch.cat([slot_experts(dispatch.header) for dispatch in dispatches])
        order = experts.argsort(stable=True)
        present, counts = torch.unique_consecutive(experts[order], return_counts=True)
        present, counts = present.tolist(), counts.tolist()
        self.load.add(layer, present, counts)
        weights = weights_by_expert(dispatches)
        hidden = brought([dispatch.hidden for dispatch in dispatches], self._device)
        rows, order = brought([torch.stack([rows[order], order])], self._device)
        in_order = expert_mlp(hidden, rows, [weights[expert] for expert in present], counts)
        outputs = torch.empty_like(in_order)
        outputs[order] = in_order
        return list(outputs.split([dispatch.header.slots_count for dispatch in dispatches]))


def largest_layer(experts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those (layer, expert) pairs of one layer that are most."""
    by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for layer, expert in experts:
        by_layer[layer].append((layer, expert))
    return max(by_layer.values(), key=len, default=[])


def weights_by_expert(dispatches: Sequence[Dispatch]) -> dict[int, GatedWeights]:
    """Weights of all experts that some dispatches of one layer name."""
    return {
        expert: weights
        for dispatch in dispatches
        for expert, weights in zip(dispatch.header.expert_ids, dispatch.weights, strict=True)
    }


def slot_experts(header: DispatchHeader) -> torch.Tensor:
    """The expert of each slot of a dispatch, `[slots]` int64."""
    return torch.repeat_interleave(torch.tensor(header.expert_ids), torch.tensor(header.slot_counts))
