"""Shards as on a GPU, by kernels in the interpreter: FP8 kept, computed and sent on while experts move."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import experts.shard
from experts.client import RemoteExperts
from experts.config import DispatchConfig
from experts.expert_size import expert_bytes
from experts.local import LocalExperts
from experts.messages import WEIGHTS
from experts.shard import ExpertShard
from experts.siblings import are_numbers, checksum
from experts.weights import ExpertFormat, every_expert, load_experts
from kernels.model.checkpoint import Checkpoint
from kernels.model.host_copies import brought
from kernels.model.safetensors_header import CheckpointError
from kernels.ops import expert_mlp as expert_mlp_module
from kernels.ops.backend import kernels_forced
from kernels.ops.expert_bank_kernel import TILES, tiles_for
from kernels.ops.expert_mlp import GatedWeights, compile_expert_mlp, expert_mlp
from kernels.ops.linear_fp8 import Fp8Weight
from kernels.ops.projection import is_fp8, plain
from kernels.transport.endpoint import Endpoint
from kernels.transport.tensors import as_bytes
from tests.checkpoints import build
from tests.experts.dispatches import (
    EXPERTS,
    LAYERS,
    SECRET,
    drawn_tokens,
    make_shard,
    memory_address,
    placed,
    placed_at,
    placed_on,
)
from tests.experts.test_siblings import same_weights

TOLERANCE = {"groups": 1e-5, "fp8": 1e-2}  # FP8: what lies between the products may be rounded the other way
HALF_COUNT = LAYERS * EXPERTS // 2
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    """Tiny ones, in float32 and in FP8."""
    return {name: Checkpoint(build(name, tmp_path_factory.mktemp(name) / name)) for name in TOLERANCE}


@pytest.fixture(scope="module")
def truths(checkpoints) -> dict[str, LocalExperts]:
    """All experts of each as a CPU computes them, FP8 as it is."""
    return {
        name: LocalExperts(load_experts(one, every_expert(one), torch.float32, keeps_fp8=True))
        for name, one in checkpoints.items()
    }


@pytest.fixture
def shard_of(checkpoints) -> Iterator[Callable[[str, str], ExpertShard]]:
    """Makes shards by checkpoint and name, to be used while kernels are forced; closes them in the end."""
    shards: list[ExpertShard] = []

    def make(checkpoint: str, name: str) -> ExpertShard:
        shards.append(make_shard(checkpoints[checkpoint], name, memory_address(), torch.float32))
        return shards[-1]

    yield make
    for shard in shards:
        shard.close()


@pytest.fixture(autouse=True)
def interpreter_of_one_thread(monkeypatch) -> None:
    """Let shards compute one after the other: the interpreter has one grid for all threads."""
    lock, real = threading.Lock(), experts.shard.expert_mlp

    def alone(*given) -> torch.Tensor:
        with lock:
            return real(*given)

    monkeypatch.setattr(experts.shard, "expert_mlp", alone)


@pytest.fixture
def node() -> Iterator[RemoteExperts]:
    """What a node dispatches through."""
    remote = RemoteExperts(DispatchConfig("node", SECRET, TIMEOUT_S))
    yield remote
    remote.close()


def assert_near(result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Nothing is off by more than a part of the greatest number."""
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", TOLERANCE)
def test_answers_are_those_of_a_cpu_alone_and_merged(name, truths, shard_of, node):
    tokens = [drawn_tokens(2), drawn_tokens(1)]
    expected = [
        truths[name].dispatch(layer, *tokens[turn]).combine() for layer, turn in ((1, 0), (1, 1), (2, 0))
    ]
    with kernels_forced():
        shard = shard_of(name, "one")
        placement = placed({"one": shard.address})
        shard.adopt(placement)
        node.adopt(placement)
        calls = [node.dispatch(1, *some) for some in tokens]  # on one channel: both wait in the same step
        while (count := shard.step(TIMEOUT_S)) == 0:
            pass
        shard.start()
        answers = [call.combine() for call in calls]
        answers.append(node.dispatch(2, *tokens[0]).combine())
        shard.close()
    assert count == 2 and node.retries_count == 0
    assert {is_fp8(weights.down) for weights in shard._holding.experts.values()} == {name == "fp8"}
    for answer, wanted in zip(answers, expected, strict=True):
        assert_near(answer, wanted, TOLERANCE[name])


def test_experts_move_in_fp8_while_nodes_ask(truths, shard_of, node):
    tokens = drawn_tokens(1)
    expected = truths["fp8"].dispatch(1, *tokens).combine()
    with kernels_forced():
        old, new = shard_of("fp8", "old"), shard_of("fp8", "new")
        halved = placed_on(old, new, epoch=2)
        swapped = replace(halved, epoch=3, shards=halved.shards[::-1])
        placements = [placed_on(old), halved, swapped]
        old.adopt(placements[0])
        for shard in (old, new):
            shard.start()
        answers = []
        for now, following in zip(placements, [*placements[1:], None], strict=True):
            node.adopt(now)
            answers.append(node.dispatch(1, *tokens).combine())
            for shard in (old, new) if following else ():
                shard.adopt(following, in_force=now, alive={"old", "new"})
            if following:
                answers.append(node.dispatch(1, *tokens).combine())  # by the placement that is leaving
        for shard in (old, new):
            shard.forget(3)
            shard.close()
    assert node.retries_count == 0 and len(answers) == 5
    for answer in answers:
        assert_near(answer, expected, TOLERANCE["fp8"])
    assert [shard.report().fetched_count for shard in (old, new)] == [0, 2 * HALF_COUNT]
    for shard in (old, new):
        assert len(shard._holding.experts) == HALF_COUNT and not shard._holding.leaving
        for pair, weights in shard._holding.experts.items():
            assert is_fp8(weights.gate_up) and same_weights(weights, truths["fp8"]._weights[pair])


def spoilt(which: int, code: int) -> Callable[[GatedWeights], list[torch.Tensor]]:
    """One byte of one of an expert's tensors is another."""

    def parts_of(weights: GatedWeights) -> list[torch.Tensor]:
        parts = [part.clone() for part in weights.plain()]
        parts[which].view(-1).view(torch.uint8)[3] = code
        return parts

    return parts_of


LIES = {
    "NaN": spoilt(0, 0x7F),
    "negative NaN": spoilt(1, 0xFF),
    "a scale that is no number": lambda weights: [
        *weights.plain()[:2],
        *(s / 0 for s in weights.plain()[2:]),
    ],
    "no scales": lambda weights: weights.plain()[:2],
    "numbers instead of FP8": lambda weights: [
        plain(one, torch.float32) for one in (weights.gate_up, weights.down)
    ],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_fp8_weights_that_are_not_right_are_not_taken(lie, truths, shard_of):
    def answer(channel, frame) -> None:
        parts = [as_bytes(part) for part in lie(truths["fp8"]._weights[tuple(frame.body[1:])])]
        channel.send(WEIGHTS, [frame.body[0], checksum(parts)], parts)

    liar = Endpoint(memory_address(), SECRET, "liar", answer)
    liar.start()
    with kernels_forced():
        new = shard_of("fp8", "new")
        in_force = placed_at(liar.address, "liar")
        new.adopt(placed({"liar": liar.address, "new": new.address}, epoch=2), None, in_force, {"liar"})
    liar.close()
    assert new.report().fetched_count == 0 and new.report().experts_count == HALF_COUNT
    for pair, weights in new._holding.experts.items():
        assert same_weights(weights, truths["fp8"]._weights[pair])


def test_every_fp8_code_but_two_is_a_number():
    for code in range(256):
        weight = torch.tensor([0, code], dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert are_numbers(weight) == (code not in (0x7F, 0xFF)) == bool(weight.float().isfinite().all())


def drawn_experts(kind: str, count: int) -> list[GatedWeights]:
    """Experts of 64 numbers, with 128 between, in rows."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    drawn = [
        ((torch.randn(256, 64) / 8).to(dtype), (torch.randn(64, 128) / 8).to(dtype)) for _ in range(count)
    ]
    as_kept = Fp8Weight.of if kind == "fp8" else lambda weight: weight
    return [GatedWeights(*map(as_kept, weights)) for weights in drawn]


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-6), ("fp8", 1e-2)])
def test_kernels_compute_experts_that_lie_apart_as_a_cpu_does(kind, tolerance):
    experts, counts = drawn_experts(kind, 34), [0] * 34  # more than a warp has lanes
    counts[0], counts[1], counts[33] = 2, 17, 3
    hidden = torch.randn(5, 64).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    rows = torch.randint(5, (22,))
    expected = expert_mlp(hidden, rows, experts, counts)
    with kernels_forced():
        result = expert_mlp(hidden, rows, experts, counts)
    assert not torch.equal(result, expected) and result.dtype == hidden.dtype
    assert_near(result.float(), expected.float(), tolerance)


def test_whatever_calls_can_launch_is_compiled_before_the_first(monkeypatch):
    widths, tiles = set(), set()

    def launched(hidden, rows, offsets, table) -> None:
        count = table.experts_count
        widths.add(max(32, 1 << (count - 1).bit_length()))
        tiles.add(tiles_for(table.dtype, len(rows) / count))

    monkeypatch.setattr(expert_mlp_module, "experts_contiguous_kernel", launched)
    with kernels_forced():
        compile_expert_mlp(drawn_experts("fp8", 130), torch.zeros(1, 64))
    assert widths == {32, 64, 128, 256} and tiles == set(TILES[torch.float8_e4m3fn])
    widths.clear()
    with kernels_forced():
        compile_expert_mlp(drawn_experts("fp8", 9), torch.zeros(1, 64))
    assert widths == {32}


def test_experts_of_different_formats_are_refused():
    hidden, rows = torch.zeros(1, 64), torch.zeros(2, dtype=torch.int64)
    mixed = [*drawn_experts("float32", 1), *drawn_experts("bfloat16", 1)]
    with kernels_forced():
        with pytest.raises(ValueError, match="differ in format or size"):
            expert_mlp(hidden, rows, mixed, [1, 1])
        with pytest.raises(ValueError, match=r"hidden is torch.float32, weights are"):
            expert_mlp(hidden, rows, drawn_experts("bfloat16", 1), [2])


def test_a_format_says_what_an_expert_is_in_memory(checkpoints, truths):
    for name, truth in truths.items():
        expert_format = ExpertFormat.of(checkpoints[name].config, torch.float32, keeps_fp8=True)
        parts = truth._weights[1, 0].plain()
        assert expert_format.parts == tuple((tuple(part.shape), part.dtype) for part in parts)
        assert expert_bytes(checkpoints[name].config, 4, keeps_fp8=True) == sum(part.nbytes for part in parts)
    assert not ExpertFormat.of(checkpoints["fp8"].config, torch.float32, keeps_fp8=False).is_fp8


def test_an_expert_that_is_not_fp8_in_an_fp8_checkpoint_is_named(checkpoints, monkeypatch):
    load = Checkpoint.load

    def without_one(self, names, *rest, **options):
        loaded = load(self, names, *rest, **options)
        return loaded | {names[4]: plain(loaded[names[4]], torch.float32)}

    monkeypatch.setattr(Checkpoint, "load", without_one)
    with pytest.raises(CheckpointError, match=r"experts.1.up_proj.weight: is not FP8"):
        load_experts(checkpoints["fp8"], [(1, 0), (1, 1)], torch.float32, keeps_fp8=True)


def test_tokens_of_several_nodes_go_to_a_device_as_one():
    parts = [torch.ones(2, 3), torch.zeros(1, 3)]
    assert torch.equal(brought(parts, torch.device("cpu")), torch.cat(parts))
    assert brought(parts, torch.device("meta")).shape == (3, 3)
    assert brought([parts[0].to("meta"), parts[1]], torch.device("meta")).shape == (3, 3)
    assert brought(parts[:1], torch.device("cpu")) is parts[0]
