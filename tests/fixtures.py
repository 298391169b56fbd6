"""A tiny model loaded once; a prefill node, a decode node and a gateway in this process, moved by hand."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from decode.config import DecodeConfig
from decode.messages import DOWN as DECODE_DOWN
from decode.messages import UP as DECODE_UP
from decode.messages import (
    CancelRequest,
    PageReservation,
    RequestFailed,
    ReservePages,
    SamplingParameters,
    TokenChunk,
    TokenChunks,
)
from decode.node import DecodeNode
from experts.local import LocalExperts
from kernels.model.checkpoint import Checkpoint
from kernels.model.pages import PAGE_TOKENS
from kernels.model.transformer import Transformer
from kernels.transport.endpoint import Endpoint
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel
from prefill.config import PrefillConfig
from prefill.messages import DOWN as PREFILL_DOWN
from prefill.messages import UP as PREFILL_UP
from prefill.messages import FirstTokenChunk, PrefillPrompt
from prefill.node import PrefillNode
from tests.checkpoints import build

CHECKPOINT = "groups"
SECRET = "a secret of the tests"
PREFILL_PAGES, DECODE_PAGES = 24, 24
TURNS_MAX = 2000
GREEDY = SamplingParameters(temperature=0.0, tokens_max=6, ignore_eos=True)


class Gateway:
    """What a gateway says to two nodes, and all that they answer."""

    def __init__(self, name: str, prefill: PrefillNode, decode: DecodeNode):
        self.said: list[object] = []
        self.endpoint = Endpoint(f"memory://{name}", SECRET, name, self._on_frame)
        self.prefill = self.endpoint.connect(prefill.endpoint.address)
        self.decode = self.endpoint.connect(decode.endpoint.address)
        self.asked: dict[tuple[str, int], ReservePages] = {}
        self.priorities: dict[str, int] = {}
        self.forwards = True
        """Whether a prompt goes to prefill as soon as its pages are reserved."""

    def ask(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParameters = GREEDY,
        generation: int = 1,
        prompt_tokens_count: int | None = None,
        priority: int = 0,
    ) -> None:
        """Begin a request, or an attempt at one that has outputs already."""
        count = len(token_ids) if prompt_tokens_count is None else prompt_tokens_count
        asked = ReservePages(request_id, generation, tuple(token_ids), count, sampling)
        self.asked[request_id, generation] = asked
        self.priorities[request_id] = priority
        DECODE_DOWN.send(self.decode, asked)

    def forward(self, reservation: PageReservation) -> None:
        """Send the prompt of a reservation to prefill, unless it was cancelled meanwhile."""
        asked = self.asked.get((reservation.request_id, reservation.generation))
        if asked is None:
            return
        prompt = PrefillPrompt(
            asked.request_id,
            asked.generation,
            asked.token_ids,
            asked.prompt_tokens_count,
            asked.sampling,
            reservation.address,
            self.priorities[asked.request_id],
        )
        PREFILL_DOWN.send(self.prefill, prompt)

    def cancel(self, request_id: str, generation: int = 1) -> None:
        """Take a request off both nodes, and forward it no more."""
        self.asked.pop((request_id, generation), None)
        DECODE_DOWN.send(self.decode, CancelRequest(request_id, generation))
        PREFILL_DOWN.send(self.prefill, CancelRequest(request_id, generation))

    def heard(self, kind: type) -> list:
        """Everything of one kind that came."""
        return [message for message in self.said if isinstance(message, kind)]

    def failures(self) -> list[tuple[str, str, bool]]:
        """Request, reason and whether another attempt makes sense, of each failure told."""
        return [(failed.request_id, failed.reason, failed.retryable) for failed in self.heard(RequestFailed)]

    def chunks(self, request_id: str) -> list[TokenChunk]:
        """A request's chunks in the order of their tokens."""
        first = [message.chunk for message in self.heard(FirstTokenChunk)]
        later = [chunk for message in self.heard(TokenChunks) for chunk in message.chunks]
        own = [chunk for chunk in first + later if chunk.request_id == request_id]
        return sorted(own, key=lambda chunk: (chunk.generation, chunk.index))

    def tokens(self, request_id: str) -> list[int]:
        """A request's tokens."""
        return [token for chunk in self.chunks(request_id) for token in chunk.token_ids]

    def assert_in_order(self, request_id: str) -> None:
        """A request's chunks lack and repeat nothing, and the last alone says that it is the last."""
        chunks = self.chunks(request_id)
        assert [chunk.index for chunk in chunks] == list(
            range(chunks[0].index, chunks[0].index + len(chunks))
        )
        assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]

    def _on_frame(self, channel: StreamChannel, frame: Frame) -> None:
        schema = PREFILL_UP if channel is self.prefill else DECODE_UP
        message = schema.read_frame(frame)
        self.said.append(message)
        if isinstance(message, PageReservation) and self.forwards:
            self.forward(message)


class Stage:
    """Two nodes whose threads never start, and their gateways: nothing moves unless a test moves it."""

    _numbers = itertools.count()

    def __init__(
        self,
        transformer: Transformer,
        packs_latents: bool = False,
        latents_address: str = "",
        **limits: int,
    ):
        self.now_s = 1000.0
        self.name = f"stage-{next(self._numbers)}"
        model = transformer.config
        page_bytes = model.layers_count * PAGE_TOKENS * transformer.latent_layout(packs_latents).row_bytes
        names = [f"{self.name}-prefill", f"{self.name}-decode"]
        self.prefill = PrefillNode(
            PrefillConfig(
                names[0],
                f"memory://{names[0]}",
                SECRET,
                page_bytes * limits.get("prefill_pages", PREFILL_PAGES),
                step_tokens_max=limits.get("step_tokens_max", 256),
                packs_latents=packs_latents,
            ),
            transformer,
            clock=lambda: self.now_s,
        )
        self.decode = DecodeNode(
            DecodeConfig(
                names[1],
                f"memory://{names[1]}",
                SECRET,
                page_bytes * limits.get("decode_pages", DECODE_PAGES),
                requests_max=limits.get("requests_max", 64),
                lease_s=10.0,
                latents_address=latents_address,
                packs_latents=packs_latents,
            ),
            transformer,
            clock=lambda: self.now_s,
        )
        for node in (self.prefill, self.decode):
            # so that what was never written shows where it is read: these bits are NaN in every format
            node.cache.latents.view(torch.uint8).fill_(0xFF)
        self.gateways: list[Gateway] = []
        self.gone: list[object] = []
        self.gateway = self.open_gateway()

    def open_gateway(self) -> Gateway:
        """One more gateway."""
        gateway = Gateway(f"{self.name}-gateway-{len(self.gateways)}", self.prefill, self.decode)
        self.gateways.append(gateway)
        return gateway

    def moves(self) -> list[Callable[[], int]]:
        """All that can happen next, in the order of a turn; each says how much moved."""
        gateways = [gateway for gateway in self.gateways if gateway not in self.gone]
        nodes = [node for node in (self.prefill, self.decode) if node not in self.gone]
        endpoints = [part.endpoint for part in (*gateways, *nodes)]
        if self.decode in nodes:
            endpoints += self.decode.endpoints[1:]
        polls = [lambda endpoint=endpoint: endpoint.poll(0) for endpoint in endpoints]
        return [*polls, *(node.step for node in nodes)]

    def turn(self) -> int:
        """Frames, then a step of each node; how much moved."""
        return sum(move() for move in self.moves())

    def end(self, part: "Gateway | PrefillNode | DecodeNode") -> None:
        """Let a node or gateway disappear: its channels close, and it never moves again."""
        self.gone.append(part)
        (part.endpoint if isinstance(part, Gateway) else part).close()

    def until(self, condition: Callable[[], bool]) -> None:
        """Turn until a condition holds."""
        for _ in range(TURNS_MAX):
            if condition():
                return
            self.turn()
        raise AssertionError("the condition never came true")

    def settle(self) -> None:
        """Turn until nothing moves any more."""
        still = 0
        for _ in range(TURNS_MAX):
            still = 0 if self.turn() else still + 1
            if still == 3:
                return
        raise AssertionError("the nodes never came to rest")

    def assert_all_free(self) -> None:
        """The nodes that are left hold no request, and no page that anybody owns."""
        for node in (self.prefill, self.decode):
            if node in self.gone:
                continue
            report = node.report()
            node.cache.pool.check()
            assert report.requests_running_count == report.requests_waiting_count == 0, report
            assert report.pages_leased_count == 0, report
            assert report.pages_free_count + report.pages_cached_count == report.pages_total_count

    def close(self) -> None:
        """Close every endpoint."""
        for part in (*self.gateways, self.prefill, self.decode):
            if part not in self.gone:
                self.end(part)


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint, built once in a run whoever asks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.getbasetemp() / f"shared-{CHECKPOINT}"
    return folder if folder.exists() else build(CHECKPOINT, folder)


@pytest.fixture(scope="session")
def transformer(checkpoint_folder) -> Transformer:
    """The tiny model with all experts in this process."""
    checkpoint = Checkpoint(checkpoint_folder)
    experts = LocalExperts.from_checkpoint(checkpoint, torch.float32)
    return Transformer.from_checkpoint(checkpoint, torch.float32, experts)


@pytest.fixture
def make_stage(transformer) -> Iterator[Callable[..., Stage]]:
    """Stages with limits of the test's own, closed at its end."""
    stages: list[Stage] = []

    def make(**limits: int) -> Stage:
        stages.append(Stage(transformer, **limits))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture
def stage(make_stage) -> Stage:
    """Two nodes and a gateway with the usual limits."""
    return make_stage()
