"""The whole cluster in one process, one thread and memory: the truth that every topology is compared with.

The router, nodes, inbox and outbox are those of a cluster; only the experts are local and nobody waits.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from cluster.events import (
    Command,
    DeliverTokens,
    Event,
    FailRequest,
    FinishRequest,
    NodeJoined,
    NodeSaid,
    Phases,
    RequestAdmitted,
    RoutedRequest,
    SayToNode,
    TimePassed,
)
from cluster.node_messages import read_from_node, send_to_node
from cluster.router import Router
from decode.config import DecodeConfig
from decode.messages import SamplingParameters, TokenLogprob
from decode.node import DecodeNode
from experts.banked import BankedExperts
from experts.local import LocalExperts
from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.model.moe import RoutedExperts
from kernels.model.pages import pages_for
from kernels.model.transformer import Transformer
from kernels.transport.endpoint import Endpoint
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel
from prefill.config import PrefillConfig
from prefill.messages import PrefillPrompt
from prefill.node import PrefillNode
from prefill.request import Chunk, PrefillRequest

SECRET = "in one process"  # nobody else can reach memory:// addresses
LATENTS_BYTES = 256 << 20
TURNS_IDLE_MAX = 10_000


class RequestRefused(RuntimeError):
    """The reference could not finish a request; the text says why."""


@dataclass
class Generation:
    """What came of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    cached_tokens_count: int = 0
    phases: Phases | None = None
    error: str = ""


class Reference:
    """One prefill and one decode node with LocalExperts, driven turn by turn."""

    _names = itertools.count()

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        latents_bytes: int = LATENTS_BYTES,
        step_tokens_max: int = 512,
        requests_max: int = 64,
        routed: RoutedExperts | None = None,
        on_progress: ProgressCallback | None = None,
        packs_latents: bool = False,
        device: str = "cpu",
        keeps_fp8: bool = False,
    ):
        kind = LocalExperts if device == "cpu" else BankedExperts
        experts = routed or kind.from_checkpoint(checkpoint, dtype, on_progress, device)
        self.transformer = Transformer.from_checkpoint(
            checkpoint, dtype, experts, on_progress, device, keeps_fp8
        )
        name = f"reference-{next(self._names)}"
        prefill = PrefillConfig(
            f"{name}-prefill",
            f"memory://{name}-prefill",
            SECRET,
            latents_bytes,
            step_tokens_max,
            requests_max,
            1,
            packs_latents,
        )
        decode = DecodeConfig(
            f"{name}-decode",
            f"memory://{name}-decode",
            SECRET,
            latents_bytes,
            requests_max,
            1,
            packs_latents=packs_latents,
        )
        self.prefill = PrefillNode(prefill, self.transformer)
        self.decode = DecodeNode(decode, self.transformer)
        self.router = Router(decode.lease_s)
        self.generations: dict[str, Generation] = {}
        self._endpoint = Endpoint(f"memory://{name}", SECRET, name, self._on_frame)
        self._channels: dict[str, StreamChannel] = {}
        self._on_tokens: Callable[[str, tuple[int, ...]], None] | None = None
        for node in (self.prefill, self.decode):
            self._join(node)

    def generate(
        self,
        requests: Sequence[RoutedRequest],
        on_tokens: Callable[[str, tuple[int, ...]], None] | None = None,
    ) -> list[Generation]:
        """Run requests together to their ends; raises RequestRefused.

        `on_tokens(request id, token ids)` is called as they come.
        """
        self._on_tokens = on_tokens
        for request in requests:
            self.generations[request.request_id] = Generation()
            self._tell(RequestAdmitted(request))
        idle_count = 0
        while self.router.routes:
            idle_count = 0 if self.turn() else idle_count + 1
            if idle_count:
                self._tell(TimePassed())
            if idle_count > TURNS_IDLE_MAX:
                raise RequestRefused(
                    "nothing moves any more: a request needs more pages than the reference has"
                )
        done = [self.generations.pop(request.request_id) for request in requests]
        if failed := next((generation.error for generation in done if generation.error), None):
            raise RequestRefused(failed)
        return done

    def turn(self) -> int:
        """Let everything that can move take one step; how much did."""
        moved = self._endpoint.poll(0) + self.prefill.endpoint.poll(0) + self.decode.endpoint.poll(0)
        return moved + self.prefill.step() + self.decode.step()

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Scores after each token of a prompt, `[tokens, vocab]` float32, from a prefill step of its own."""
        asked = PrefillPrompt("logits", 0, tuple(token_ids), len(token_ids), SamplingParameters(), "")
        pages = self.prefill.cache.pool.lease(pages_for(len(token_ids)))
        request = PrefillRequest(asked, self._channels[self.prefill.config.name], 0.0, pages)
        step = self.prefill.prefill_step
        try:
            _, hidden = step.hidden([Chunk(request, 0, len(token_ids))], lambda *_: None)
        finally:
            self.prefill.cache.pool.release(pages)
        return self.transformer.logits(hidden)

    def close(self) -> None:
        """Close the nodes' endpoints."""
        for part in (self.prefill, self.decode, self._endpoint):
            part.close()

    def _join(self, node: PrefillNode | DecodeNode) -> None:
        report = node.report()
        self._channels[report.name] = self._endpoint.connect(report.address)
        self._channels[report.name].peer = report.name
        self._tell(NodeJoined(report.name, report.kind))
        self._tell(NodeSaid(report.name, report))

    def _on_frame(self, channel: StreamChannel, frame: Frame) -> None:
        kind = self.router.nodes[channel.peer].kind
        self._tell(NodeSaid(channel.peer, read_from_node(kind, frame)))

    def _tell(self, event: Event) -> None:
        for command in self.router.handle(event, time.monotonic()):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case SayToNode(name, message):
                send_to_node(self._channels[name], message)
            case DeliverTokens(request_id, token_ids, logprobs):
                self.generations[request_id].token_ids.extend(token_ids)
                self.generations[request_id].logprobs.extend(logprobs)
                if self._on_tokens is not None:
                    self._on_tokens(request_id, token_ids)
            case FinishRequest(request_id, reason, cached, phases):
                generation = self.generations[request_id]
                generation.finish_reason, generation.cached_tokens_count = reason, cached
                generation.phases = phases
            case FailRequest(request_id, _, message):
                self.generations[request_id].error = message
