"""The least work of operations, by hand and beside published floors."""

import pytest

from benchmarks.gpu.roofline import H200
from benchmarks.gpu.sizes import V3
from benchmarks.gpu.work import (
    BFLOAT16,
    FP8,
    Work,
    expert_bytes,
    experts_work,
    gate_work,
    linear_fp8_work,
    mla_decode_work,
    mla_prefill_work,
    rows_work,
)

GIGABYTE = 1e9


@pytest.mark.parametrize(
    ("requests", "context", "floor_us", "limit"),
    [(1, 4096, 1.4, "products"), (32, 8192, 92, "products"), (128, 4096, 185, "products")],
)
def test_floors_of_attention_with_128_heads(requests, context, floor_us, limit):
    work = mla_decode_work(requests, context, 128, V3.value, V3.position, 2 * V3.latent)
    assert H200.floor_us(work) == pytest.approx(floor_us, rel=0.04)
    assert H200.limit(work) == limit


def test_attention_with_16_heads_is_bound_by_memory():
    work = mla_decode_work(128, 4096, 16, V3.value, V3.position, 2 * V3.latent)
    assert H200.limit(work) == "memory"
    assert work.bytes == 128 * 4096 * 1152 + 128 * 16 * (576 + 512) * 2


def test_a_prompt_attends_to_half_of_the_square():
    work = mla_prefill_work(3, 1, 2, 1, 2)
    assert work.flops == 2 * 6 * (2 + 1 + 2)
    assert work.bytes == 3 * (2 * (3 + 4 + 1 + 2) + 4)


def test_all_experts_of_a_layer_are_eleven_gigabytes_in_fp8():
    assert 256 * expert_bytes(V3.hidden, V3.intermediate, FP8) / GIGABYTE == pytest.approx(11.28, abs=0.01)
    assert expert_bytes(V3.hidden, V3.intermediate, BFLOAT16) == 6 * V3.hidden * V3.intermediate


def test_experts_that_nobody_chose_are_not_read():
    one = experts_work(8, 1, 8, 256, 128, BFLOAT16)
    two = experts_work(8, 1, 7, 256, 128, BFLOAT16)
    assert one.bytes - two.bytes == expert_bytes(256, 128, BFLOAT16)
    assert one.flops == two.flops == 8 * 6 * 256 * 128


def test_rows_gates_and_products_by_hand():
    assert rows_work(3, 10, 4, 5) == Work(0, 47)
    assert gate_work(2, 16, 4) == Work(0, 4 * 32 + 64 + 12 * 8)
    ragged = linear_fp8_work(2, 130, 257)
    assert ragged == Work(2 * 2 * 130 * 257, 2 * 257 + 2 * 3 * 4 + 130 * 257 + 2 * 3 * 4 + 2 * 2 * 130, FP8)
