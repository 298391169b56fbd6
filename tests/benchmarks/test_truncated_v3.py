"""A tiny model of V3's structure through the whole benchmark, and the arithmetic of deployments by hand."""

import json
import math

import pytest
import torch

from benchmarks import truncated_v3
from benchmarks.gpu.deployment import Deployment, Shape, StepTimes, lines_of, project
from benchmarks.gpu.v3_model import TINY, V3, filled_cache, random_transformer, truncated_config
from benchmarks.gpu.v3_steps import StepClock, TruncatedModel
from kernels.model.tensor_names import attention_half_shapes
from kernels.ops.backend import IS_INTERPRETED
from kernels.ops.linear_fp8 import Fp8Weight

SHAPE = Shape(dense_layers=3, moe_layers=58, experts=256, choices=8, hidden=7168)
TIMES = StepTimes(tokens=128, beside_us=100.0, dense_us=200.0, half_us=300.0, whole_us=4000.0)


def test_the_whole_shape_has_as_many_weights_as_published():
    config = truncated_config(V3, 61, 3)
    half = sum(math.prod(shape) for shape in attention_half_shapes(config).values())
    routed = 58 * 256 * 3 * config.hidden_size * config.moe_intermediate_size
    assert half / 1e9 == pytest.approx(17.1, abs=0.05)
    assert (half + routed) / 1e9 == pytest.approx(671, abs=0.5)


def test_layers_are_differences_of_steps():
    times = StepTimes.of(8, 10.0, 30.0, 90.0, 150.0, dense=2, moe=3)
    assert times == StepTimes(8, 10.0, 10.0, 20.0, 40.0)


def test_a_deployment_by_hand():
    deployment = Deployment(64, 32)
    assert deployment.experts_each(SHAPE) == 8
    assert deployment.slots_each(SHAPE, 128) == 64 * 128 * 8 // 32
    projection = project(SHAPE, TIMES, deployment, shard_us=400.0)
    node_ms = (100 + 3 * 200 + 58 * 300) / 1e3
    assert projection.node_ms == pytest.approx(node_ms)
    assert projection.apart_ms == pytest.approx(node_ms + 58 * 0.4)
    assert projection.overlapped_ms == pytest.approx(0.7 + 58 * 0.4)
    assert projection.network_mb == pytest.approx(128 * 8 * 7168 * 3 / 1e6)
    figures = projection.figures()
    assert figures["tokens/s apart"] == pytest.approx(64 * 128 / projection.apart_ms * 1e3, rel=1e-4)
    assert figures["tokens/s overlapped a GPU"] == pytest.approx(
        64 * 128 / projection.overlapped_ms * 1e3 / 96, rel=1e-4
    )


def test_the_arithmetic_is_told_line_by_line():
    projection = project(SHAPE, TIMES, Deployment(64, 32), shard_us=400.0)
    told = "\n".join(lines_of(SHAPE, TIMES, Deployment(64, 32), projection))
    for part in (
        "64 nodes of 128 tokens a step, 32 shards of 8 experts",
        "100 + 3 x 200 + 58 x 300 µs = 18.10 ms",
        "64 x 128 x 8 / 32 = 2,048 slots a layer in 400 µs",
        "18.10 ms + 58 x 400 µs = 41.30 ms apart; 23.90 ms",
        "198,354 to 342,762 tokens/s on 96 GPUs: 2,066 to 3,570 each",
        "22.0 MB a node and MoE layer, 440 µs at 50 GB/s",
    ):
        assert part in told


@pytest.mark.skipif(not IS_INTERPRETED, reason="kernels are not interpreted")
def test_a_tiny_model_goes_all_the_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(truncated_v3, "DEPLOYMENTS", (Deployment(2, 4),))
    output = tmp_path / "figures.json"
    sizes = {"prompts": "3", "batches": "2", "context": 20, "layers": 2, "dense": 1}
    truncated_v3.main(**sizes, fp8_latents=True, graphs=True, output=output, interpret=True)
    figures = json.loads(output.read_text())
    assert figures["latents"] == "FP8"
    assert figures["graphs"] is False
    for kind, size in (("prefill", "3"), ("decode", "2")):
        one = figures[kind][size]
        assert "failed" not in one
        assert set(one["steps us"]) == {"none", "dense", "half", "whole"}
        assert one["projections"][0]["slots_a_shard"] == 2 * int(size) * 2 // 4
    assert "4 shards of 2 experts" in capsys.readouterr().out


@pytest.fixture
def tiny() -> TruncatedModel:
    """One dense layer and one MoE layer on a CPU."""
    transformer = random_transformer(truncated_config(TINY, 2, 1), torch.device("cpu"))
    return TruncatedModel(transformer, filled_cache(transformer, 4, False), tokens_max=8, records=False)


def test_weights_are_fp8_where_the_published_ones_are(tiny):
    dense, moe = tiny.transformer.layers
    assert isinstance(dense.dense.gate_up, Fp8Weight)
    assert isinstance(moe.moe._shared.down, Fp8Weight)
    assert isinstance(moe.attention._out, Fp8Weight)
    assert tiny.transformer.dtype == torch.bfloat16
    assert [len(variant.layers) for variant in tiny.variants().values()] == [0, 1, 2, 2]


def test_logits_that_are_no_numbers_are_not_timed():
    with pytest.raises(ArithmeticError, match="NaN"):
        StepClock(torch.device("cpu")).measure_us(lambda: torch.tensor([1.0, float("nan")]))


def failing_model(figures: dict, monkeypatch, capsys) -> str:
    """What is told where every step fails."""

    class Failing:
        transformer = type("Nothing", (), {"config": None, "device": None})

        def prefill_us(self, *_):
            """Not run."""

        decode_us = prefill_us

    def fails(*_):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(truncated_v3, "Shards", lambda *_: None)
    monkeypatch.setattr(truncated_v3, "measured", fails)
    truncated_v3.measure(Failing(), [4], [1], 20, figures, lambda: None)
    return capsys.readouterr().out


def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch, capsys):
    figures = {"graphs": False}
    failing_model(figures, monkeypatch, capsys)
    failed = {"failed": "RuntimeError: illegal memory access"}
    assert figures == {"graphs": False, "prefill": {"4": failed}, "decode": {"1": failed}}


def test_a_recording_that_fails_begins_again_without_graphs(monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(truncated_v3.os, "execv", lambda _, given: begun.append(given))
    failing_model({"graphs": True}, monkeypatch, capsys)
    assert [given[1:3] for given in begun] == [["-m", "benchmarks.truncated_v3"]]
    assert begun[0][-1] == "--no-graphs"


def test_sizes_are_positive_numbers():
    assert truncated_v3.numbers_of("1, 8,,32") == [1, 8, 32]
    assert truncated_v3.numbers_of("") == []
    for wrong in ("0", "-1", "a", "1.5"):
        with pytest.raises(truncated_v3.typer.BadParameter):
            truncated_v3.numbers_of(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_is_needed(capsys):
    with pytest.raises(SystemExit) as ended:
        truncated_v3.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == truncated_v3.NO_GPU
