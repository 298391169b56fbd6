"""Dispatch and combine of 32 tokens beside a bare echo of the same bytes: `python -m benchmarks.dispatch`.

As many processes on both sides, unix sockets on both; the experts' arithmetic is taken out of the shards, so
that what is left is what we add to a socket: choosing shards, headers, gathering rows, mixing outputs.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from experts.client import RemoteExperts
from experts.config import DispatchConfig, ShardConfig
from experts.messages import Placement, ShardAddress
from experts.placement import even_placement
from experts.shard import Dispatch, ExpertShard, Holding

TOKENS = 32
HIDDEN = 512
EXPERTS = 32
CHOICES = 4
ROUNDS = 1000
SECRET = "benchmark"


class EchoingShard(ExpertShard):
    """A real shard in everything but arithmetic: each slot gets its own hidden state back."""

    def _compute(self, layer: int, dispatches: list[Dispatch]) -> list[torch.Tensor]:
        return [dispatch.hidden[dispatch.rows] for dispatch in dispatches]


class NoCheckpoint:
    """What a shard asks of a checkpoint when it computes nothing."""

    class config:
        """Sizes."""

        dense_layers_count = 0
        moe_layers = range(1)
        routed_experts_count = EXPERTS
        hidden_size = HIDDEN


def run_shard(name: str, address: str, placement: Placement) -> None:
    """A shard's process."""
    torch.set_num_threads(1)
    shard = EchoingShard(ShardConfig(name, address, SECRET), NoCheckpoint(), torch.float32)
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
    """Median microseconds of a round trip to all shards, ours and bare, by number of shards."""
    return {f"{count} shards": measure_one(count) for count in shards_counts}


def measure_one(shards_count: int) -> dict[str, float]:
    """Ours and bare in turns, so that both see the same machine."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="trivium-dispatch-"))
    shards = [ShardAddress(f"shard-{i}", f"unix://{folder}/shard-{i}") for i in range(shards_count)]
    placement = even_placement(shards, 0, 1, EXPERTS, epoch=1)
    chance = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=chance)
    ids = torch.rand(TOKENS, EXPERTS, generator=chance).topk(CHOICES).indices
    weights = torch.full((TOKENS, CHOICES), 1 / CHOICES)
    context = multiprocessing.get_context("spawn")
    sizes = frame_bytes(ids, placement, shards_count)
    ours = [
        context.Process(target=run_shard, args=(shard.name, shard.address, placement), daemon=True)
        for shard in shards
    ]
    bare = [
        context.Process(target=run_echo, args=(f"{folder}/echo-{i}", *size), daemon=True)
        for i, size in enumerate(sizes)
    ]
    for process in (*ours, *bare):
        process.start()
    experts = RemoteExperts(DispatchConfig("benchmark", SECRET))
    experts.adopt(placement)
    peers = [connected(f"{folder}/echo-{i}") for i in range(shards_count)]
    buffers = [memoryview(bytearray(size[1])) for size in sizes]
    messages = [bytes(size[0]) for size in sizes]

    def echo() -> None:
        for peer, message in zip(peers, messages, strict=True):
            peer.sendall(message)
        for peer, buffer in zip(peers, buffers, strict=True):
            read_all(peer, buffer)

    def dispatch() -> None:
        experts.dispatch(0, hidden, ids, weights).combine()

    for _ in range(50):
        dispatch(), echo()
    times = {"ours_us": [], "bare_us": []}
    for _ in range(ROUNDS // 50):
        for name, run in (("ours_us", dispatch), ("bare_us", echo)):
            for _ in range(50):
                begin = time.perf_counter()
                run()
                times[name].append(1e6 * (time.perf_counter() - begin))
    experts.close()
    for process in (*ours, *bare):
        process.terminate()
        process.join()
    medians = {name: round(median(values), 1) for name, values in times.items()}
    return medians | {"ratio": round(medians["ours_us"] / medians["bare_us"], 2)}


def frame_bytes(ids: torch.Tensor, placement: Placement, shards_count: int) -> list[tuple[int, int]]:
    """Bytes of hidden states to each shard, once a token, and of outputs back, once a slot."""
    homes = torch.tensor(placement.homes[0])[ids]
    sizes = []
    for shard in range(shards_count):
        mine = homes == shard
        sizes.append((int(mine.any(1).sum()) * HIDDEN * 4, int(mine.sum()) * HIDDEN * 4))
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
    console.print(
        f"{os.cpu_count()} cores; {TOKENS} tokens of {HIDDEN} floats, {CHOICES} of {EXPERTS} experts"
    )
    for shards, figures in measure_dispatch().items():
        console.print(shards, figures)
