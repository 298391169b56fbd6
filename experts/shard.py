"""One process that holds some experts and computes them for any node that asks."""

import logging
import threading
from collections import defaultdict
from dataclasses import dataclass

import torch

from experts.config import ShardConfig
from experts.errors import DispatchRefused
from experts.load import ExpertLoad
from experts.messages import COMBINE, DISPATCH, REFUSED, DispatchHeader, Placement, ShardReport
from experts.weights import ExpertWeights, load_experts
from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.ops.expert_mlp import expert_mlp
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelError
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel
from kernels.transport.tensors import as_bytes, from_bytes

logger = logging.getLogger(__name__)

IDLE_S = 0.5


@dataclass(slots=True)
class Dispatch:
    """A node's tokens, waiting for their experts."""

    channel: StreamChannel
    header: DispatchHeader
    hidden: torch.Tensor
    rows: torch.Tensor


class ExpertShard:
    """Some experts; dispatches of several nodes that wait for the same layer are computed together."""

    def __init__(self, config: ShardConfig, checkpoint: Checkpoint, dtype: torch.dtype):
        model = checkpoint.config
        self.config = config
        self.epoch = 0
        self.load = ExpertLoad(model.dense_layers_count, len(model.moe_layers), model.routed_experts_count)
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._experts: ExpertWeights = {}
        self._arrived: list[Dispatch] = []
        self._dispatches_count = 0
        self._refused_count = 0
        self._endpoint = Endpoint(config.address, config.secret, config.name, self._on_frame)
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def address(self) -> str:
        """Where nodes connect."""
        return self._endpoint.address

    def adopt(self, placement: Placement, on_progress: ProgressCallback | None = None) -> None:
        """Load what a newer placement gives this shard, then go by it; the rest is dropped. Any one thread."""
        if placement.epoch <= self.epoch:
            return
        wanted = placement.experts_of(self.config.name)
        missing = [expert for expert in wanted if expert not in self._experts]
        loaded = load_experts(self._checkpoint, missing, self._dtype, on_progress)
        self._experts = {expert: loaded.get(expert) or self._experts[expert] for expert in wanted}
        self.epoch = placement.epoch

    def start(self) -> None:
        """Serve in a thread of its own until closed."""
        self._thread = threading.Thread(target=self._run, name=f"{self.config.name}-compute", daemon=True)
        self._thread.start()

    def step(self, timeout_s: float) -> int:
        """Take what has come within `timeout_s`, compute it layer by layer, and answer; how many dispatches."""
        self._endpoint.poll(timeout_s)
        arrived, self._arrived = self._arrived, []
        by_layer: dict[int, list[Dispatch]] = defaultdict(list)
        for dispatch in arrived:
            by_layer[dispatch.header.layer].append(dispatch)
        for layer, dispatches in by_layer.items():
            self._compute(layer, dispatches)
        return len(arrived)

    def report(self) -> ShardReport:
        """Numbers about this shard."""
        return ShardReport(
            name=self.config.name,
            address=self.address,
            epoch=self.epoch,
            experts_count=len(self._experts),
            dispatches_count=self._dispatches_count,
            slots_count=self.load.slots_count,
            refused_count=self._refused_count + self._endpoint.counts.refused_peers_count,
            load=self.load.table(),
        )

    def close(self) -> None:
        """Stop serving and free the address."""
        self._stopping = True
        self._endpoint.wake()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self._endpoint.close()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.step(IDLE_S)
            except Exception:
                logger.exception("%s: a step failed; nodes will ask again", self.config.name)

    def _on_frame(self, channel: StreamChannel, frame: Frame) -> None:
        if frame.kind != DISPATCH:
            raise ChannelError(f"a shard takes no {frame.kind!r}")
        header = DispatchHeader.from_body(frame.body)
        try:
            self._check(header)
        except DispatchRefused as refusal:
            self._refused_count += 1
            channel.send(REFUSED, [header.call_id, str(refusal)])
            return
        hidden, rows = frame.parts
        size = self._checkpoint.config.hidden_size
        dispatch = Dispatch(
            channel,
            header,
            from_bytes(hidden, self._dtype, (header.tokens_count, size)),
            from_bytes(rows, torch.int32, (header.slots_count,)),
        )
        if (
            header.slots_count
            and not 0 <= int(dispatch.rows.min()) <= int(dispatch.rows.max()) < header.tokens_count
        ):
            raise ValueError("a slot names a token that was not sent")
        self._arrived.append(dispatch)

    def _check(self, header: DispatchHeader) -> None:
        if header.epoch > self.epoch:
            raise DispatchRefused(f"epoch {header.epoch} is not here yet, {self.epoch} is")
        missing = [expert for expert in header.expert_ids if (header.layer, expert) not in self._experts]
        if missing:
            raise DispatchRefused(f"expert {missing[0]} of layer {header.layer} is not on this shard")

    def _compute(self, layer: int, dispatches: list[Dispatch]) -> None:
        self._dispatches_count += len(dispatches)
        outputs = (
            [self._compute_one(layer, dispatches[0])]
            if len(dispatches) == 1
            else self._together(layer, dispatches)
        )
        for dispatch, output in zip(dispatches, outputs, strict=True):
            try:
                dispatch.channel.send(COMBINE, [dispatch.header.call_id], [as_bytes(output)])
            except ChannelError as error:
                logger.info(
                    "%s: %s did not wait for its answer: %s", self.config.name, dispatch.channel.peer, error
                )

    def _compute_one(self, layer: int, dispatch: Dispatch) -> torch.Tensor:
        header = dispatch.header
        return self._outputs(layer, dispatch.hidden, dispatch.rows, header.expert_ids, header.slot_counts)

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
        hidden = torch.cat([dispatch.hidden for dispatch in dispatches])
        in_order = self._outputs(layer, hidden, rows[order], present.tolist(), counts.tolist())
        outputs = torch.empty_like(in_order)
        outputs[order] = in_order
        return list(outputs.split([dispatch.header.slots_count for dispatch in dispatches]))

    def _outputs(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor, experts, counts) -> torch.Tensor:
        self.load.add(layer, experts, counts)
        return expert_mlp(hidden, rows, [self._experts[layer, expert] for expert in experts], counts)


def slot_experts(header: DispatchHeader) -> torch.Tensor:
    """The expert of each slot of a dispatch, `[slots]` int64."""
    return torch.repeat_interleave(torch.tensor(header.expert_ids), torch.tensor(header.slot_counts))
