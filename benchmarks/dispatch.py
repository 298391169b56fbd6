"""Dispatch and combine of 32 tokens beside a bare echo of the same bytes: `python -m benchmarks.dispatch`.

As many processes on both sides, unix sockets on both; the experts' arithmetic is taken out of the shards, so
that what is left is what we add to a socket: choosing shards, headers, gathering rows, mixing outputs. Tokens
have the size of those in `benchmarks.serving`, and that of DeepSeek-V3's.
"""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace

import torch
from rich.console import Console

from experts.client import RemoteExperts
from experts.config import DispatchConfig, ShardConfig
from experts.holding import Holding
from experts.messages import Placement, ShardAddress
from experts.placement import even_placement
from experts.shard import Dispatch, ExpertShard
from kernels.model.config import WeightFormat

TOKENS = 32
ROUNDS = 500
WARM_UP_ROUNDS = 100
SECRET = "benchmark"


@dataclass(frozen=True)
class Sizes:
    """Of a model: numbers of a token, experts of a layer, and how many of these a token visits."""

    hidden: int
    experts: int
    choices: int


SIZES = {"512 numbers": Sizes(512, 32, 4), "7,168 numbers": Sizes(7168, 256, 8)}


class EchoingShard(ExpertShard):
    """A real shard in everything but arithmetic: each slot gets its own hidden state back."""

    def _compute(self, layer: int, dispatches: list[Dispatch]) -> list[torch.Tensor]:
        return [dispatch.hidden[dispatch.rows] for dispatch in dispatches]


def checkpoint_of(sizes: Sizes) -> SimpleNamespace:
    """What a shard asks of a checkpoint when it computes nothing."""
    config = SimpleNamespace(
        dense_layers_count=0,
        moe_layers=range(1),
        routed_experts_count=sizes.experts,
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.hidden,
        weight_format=WeightFormat("float32"),
    )
    return SimpleNamespace(config=config)


def run_shard(name: str, address: str, placement: Placement, sizes: Sizes) -> None:
    """A shard's process."""
    torch.set_num_threads(1)
    shard = EchoingShard(
        ShardConfig(name, address, SECRET, f"{address}-weights"), checkpoint_of(sizes), torch.float32
    )
    shard._holding = Holding(placement.epoch, dict.fromkeys(placement.experts_of(name), True), leaving={})
    shard._run()


def run_echo(address: str, bytes_in: int, bytes_out: int) -> None:
    """A bare peer: reads one message, writes another."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(1)
    peer, _ = listener.accept()
    buffer, answer = memoryview(bytearray(bytes_in)), bytes(bytes_out)
    while read_all(peer, buffer):
        peer.sendall(answer)


def read_all(sock: socket.socket, buffer: memoryview) -> bool:
    """Fill the buffer; False when the peer has gone."""
    got = 0
    while got < len(buffer):
        count = sock.recv_into(buffer[got:])
        if not count:
            return False
        got += count
    return True


def measure_dispatch(shards_counts: tuple[int, ...] = (1, 2, 4)) -> dict[str, dict[str, float]]:
    """Median microseconds of a round trip to all shards, ours and bare, by size of tokens and shards."""
    return {
        f"{name}, {count} shards": measure_one(count, sizes)
        for name, sizes in SIZES.items()
        for count in shards_counts
    }


def measure_one(shards_count: int, sizes: Sizes) -> dict[str, float]:
    """Ours and bare, each with processes of its own."""
    torch.set_num_threads(1)
    chance = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, sizes.hidden, generator=chance)
    ids = torch.rand(TOKENS, sizes.experts, generator=chance).topk(sizes.choices).indices
    weights = torch.full((TOKENS, sizes.choices), 1 / sizes.choices)
    with tempfile.TemporaryDirectory(prefix="trivium-dispatch-") as folder:
        shards = [ShardAddress(f"shard-{i}", f"unix://{folder}/shard-{i}") for i in range(shards_count)]
        placement = even_placement(shards, 0, 1, sizes.experts, epoch=1)
        frames = frame_bytes(ids, placement, shards_count, sizes.hidden)
        echoes = [(f"{folder}/echo-{i}", *size) for i, size in enumerate(frames)]
        with running(run_shard, [(shard.name, shard.address, placement, sizes) for shard in shards]):
            experts = RemoteExperts(DispatchConfig("benchmark", SECRET))
            experts.adopt(placement)
            ours_us = median_us(lambda: experts.dispatch(0, hidden, ids, weights).combine())
            experts.close()
        with running(run_echo, echoes):
            bare_us = median_us(bare_round_trip(echoes))
    return {"ours_us": ours_us, "bare_us": bare_us, "ratio": round(ours_us / bare_us, 2)}


@contextlib.contextmanager
def running(target: Callable, arguments: Sequence[tuple]) -> Iterator[None]:
    """One process for each tuple of arguments, ended when left."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=some, daemon=True) for some in arguments]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def bare_round_trip(echoes: Sequence[tuple[str, int, int]]) -> Callable[[], None]:
    """Sends every echo its bytes, then takes every answer."""
    peers = [connected(path) for path, _, _ in echoes]
    messages = [bytes(size) for _, size, _ in echoes]
    buffers = [memoryview(bytearray(size)) for _, _, size in echoes]

    def round_trip() -> None:
        for peer, message in zip(peers, messages, strict=True):
            peer.sendall(message)
        for peer, buffer in zip(peers, buffers, strict=True):
            read_all(peer, buffer)

    return round_trip


def median_us(run: Callable[[], object]) -> float:
    """Median microseconds of many rounds, the first ones not counted."""
    times = []
    for round_index in range(ROUNDS + WARM_UP_ROUNDS):
        begin = time.perf_counter()
        run()
        if round_index >= WARM_UP_ROUNDS:
            times.append(1e6 * (time.perf_counter() - begin))
    return round(median(times), 1)


def frame_bytes(
    ids: torch.Tensor, placement: Placement, shards_count: int, hidden_size: int
) -> list[tuple[int, int]]:
    """Bytes of hidden states to each shard, once a token, and of outputs back, once a slot."""
    homes = torch.tensor(placement.homes[0])[ids].squeeze(-1)
    sizes = []
    for shard in range(shards_count):
        mine = homes == shard
        sizes.append((int(mine.any(1).sum()) * hidden_size * 4, int(mine.sum()) * hidden_size * 4))
    return sizes


def connected(path: str) -> socket.socket:
    """A socket to a peer that may still be starting."""
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            time.sleep(0.05)


if __name__ == "__main__":
    console = Console()
    console.print(f"{os.cpu_count()} cores; {TOKENS} tokens; microseconds of a dispatch and its answer")
    for case, figures in measure_dispatch().items():
        console.print(case, figures)
