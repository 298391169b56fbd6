"""A gateway of the example model and its two nodes in this process: real gRPC, real sockets, no Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import torch

from cluster.desk import Desk
from cluster.gateway import Tokens, bind, make_server
from cluster.gateway_service import InferenceService, ServedModel
from cluster.proto import trivium_pb2_grpc
from cluster.tokenizer import Tokenizer
from cluster.validation import RequestLimits
from cluster.view import Member, View
from decode.config import DecodeConfig
from decode.node import DecodeNode
from experts.local import LocalExperts
from kernels.model.checkpoint import Checkpoint
from kernels.model.config import ModelConfig
from kernels.model.transformer import Transformer
from prefill.config import PrefillConfig
from prefill.node import PrefillNode

FOLDER = Path("examples/trivium-small")
SECRET = "a secret of the tests"
LATENTS_BYTES = 8 << 20
TIMEOUT_S = 20.0


@contextmanager
def running_nodes(transformer: Transformer, folder: Path) -> Iterator[dict[str, PrefillNode | DecodeNode]]:
    """A prefill and a decode node, each in threads of its own."""
    nodes = {
        "p": PrefillNode(PrefillConfig("p", f"unix://{folder}/p", SECRET, LATENTS_BYTES), transformer),
        "d": DecodeNode(DecodeConfig("d", f"unix://{folder}/d", SECRET, LATENTS_BYTES), transformer),
    }
    for node in nodes.values():
        node.experts_epoch = lambda: 1
        node.start()
    try:
        yield nodes
    finally:
        for node in nodes.values():
            node.close()


def load_transformer() -> Transformer:
    """The example model with all experts in this process."""
    checkpoint = Checkpoint(FOLDER)
    experts = LocalExperts.from_checkpoint(checkpoint, torch.float32)
    return Transformer.from_checkpoint(checkpoint, torch.float32, experts)


def view_of(nodes: dict[str, PrefillNode | DecodeNode]) -> View:
    """The nodes as the coordinator shows them."""
    members = (
        Member(name, node.report().kind, node.endpoint.address, report=node.report())
        for name, node in nodes.items()
    )
    return View(tuple(members))


async def until(true: Callable[[], bool]) -> None:
    """Let the loop run until something is true."""
    async with asyncio.timeout(TIMEOUT_S):
        while not true():
            await asyncio.sleep(0.005)


class Served:
    """A gateway that serves."""

    def __init__(self, desk: Desk, service: InferenceService, address: str):
        self.desk = desk
        self.service = service
        self.address = address

    async def is_idle(self) -> None:
        """Return once no request is anywhere at this gateway."""
        await until(lambda: not self.desk.requests_count and not self.desk.router.routes)


@asynccontextmanager
async def served(
    view: View,
    token: str | None = None,
    requests_waiting_max: int = 64,
    has_tokenizer: bool = True,
    stall_timeout_s: float = 30.0,
) -> AsyncIterator[Served]:
    """A gateway in this event loop that knows the nodes of a view."""
    config = ModelConfig.from_folder(FOLDER)
    tokenizer = Tokenizer.from_folder(FOLDER) if has_tokenizer else None
    model = ServedModel("small", config, tokenizer, RequestLimits(config.vocab_size, 512, 16))
    desk = Desk("gateway", SECRET, 10.0, requests_waiting_max)
    service = InferenceService(model, desk, stall_timeout_s)
    service.view = view
    server: grpc.aio.Server = make_server(1 << 20, Tokens(token))
    trivium_pb2_grpc.add_InferenceServicer_to_server(service, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    desk.start()
    await desk.follow(view)
    try:
        yield Served(desk, service, f"127.0.0.1:{port}")
    finally:
        await server.stop(0)
        desk.close()
