"""How large routed experts are in memory: numbers alone, for whoever places them without computing."""

import math

from kernels.model.config import ModelConfig
from kernels.ops.fp8_sizes import WEIGHT_BLOCK, scale_shape

Shape = tuple[int, int]


def come_in_fp8(model: ModelConfig) -> bool:
    """Whether weights are in blocks of 128 x 128, of which none is half of gate and half of up."""
    return model.weight_format.block == WEIGHT_BLOCK and model.moe_intermediate_size % WEIGHT_BLOCK[0] == 0


def expert_shapes(model: ModelConfig) -> tuple[Shape, Shape]:
    """Of one expert of one layer: gate and up, and down."""
    hidden, intermediate = model.hidden_size, model.moe_intermediate_size
    return (2 * intermediate, hidden), (hidden, intermediate)


def scale_shapes(model: ModelConfig) -> tuple[Shape, Shape]:
    """Of the scales of an expert that is kept in FP8, float32."""
    gate_up, down = expert_shapes(model)
    return scale_shape(*gate_up, WEIGHT_BLOCK), scale_shape(*down, WEIGHT_BLOCK)


def expert_bytes(model: ModelConfig, number_bytes: int, keeps_fp8: bool) -> int:
    """Memory of one expert of one layer, in numbers of so many bytes, or in the FP8 that it may come in."""
    numbers_count = sum(map(math.prod, expert_shapes(model)))
    if not (keeps_fp8 and come_in_fp8(model)):
        return numbers_count * number_bytes
    return numbers_count + 4 * sum(map(math.prod, scale_shapes(model)))
