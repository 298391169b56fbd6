"""What an operation cannot do without: floating-point operations, and bytes that must cross device memory.

Each input counts once and each output once, however often a kernel reads or writes it; what lies between two
products of one operation counts as nothing, for it could stay on the chip.
"""

from dataclasses import dataclass

BFLOAT16, FP8 = "bf16", "fp8"
SCALE_BYTES, BLOCK = 4, 128


@dataclass(frozen=True, slots=True)
class Work:
    """Least work of one call, and the numbers that its products multiply."""

    flops: int
    bytes: int
    numbers: str = BFLOAT16


def number_bytes(numbers: str) -> int:
    """Bytes of one weight."""
    return 1 if numbers == FP8 else 2


def blocks(size: int) -> int:
    """Blocks of 128 numbers, the last of which may be ragged."""
    return -(-size // BLOCK)


def mla_decode_work(
    requests: int, context: int, heads: int, value_dim: int, position_dim: int, row_bytes: int
) -> Work:
    """Every latent once, as key and as value; bfloat16 queries in and values out."""
    latent = value_dim + position_dim
    read = requests * context * row_bytes + requests * heads * latent * 2
    written = requests * heads * value_dim * 2
    return Work(2 * requests * heads * context * (latent + value_dim), read + written)


def mla_prefill_work(tokens: int, heads: int, content: int, rotary: int, value: int) -> Work:
    """One whole prompt, causal: half of the square of scores; outputs with their sums of exponentials."""
    pairs = tokens * (tokens + 1) // 2
    numbers = heads * (content + rotary) + heads * (content + value) + rotary + heads * value
    return Work(2 * heads * pairs * (content + rotary + value), tokens * (2 * numbers + 4 * heads))


def expert_bytes(hidden: int, intermediate: int, numbers: str) -> int:
    """Weights of one expert, with their scales if they are FP8."""
    scales = 3 * blocks(hidden) * blocks(intermediate) * SCALE_BYTES if numbers == FP8 else 0
    return 3 * hidden * intermediate * number_bytes(numbers) + scales


def experts_work(
    slots: int, rows_read: int, experts_met: int, hidden: int, intermediate: int, numbers: str
) -> Work:
    """Three products a slot; the weights of experts that any slot goes to; bfloat16 rows in and out."""
    weights = experts_met * expert_bytes(hidden, intermediate, numbers)
    return Work(6 * slots * hidden * intermediate, weights + 2 * hidden * (rows_read + slots), numbers)


def linear_fp8_work(rows: int, outputs: int, inputs: int) -> Work:
    """FP8 rows and weights with their scales in, bfloat16 out."""
    read = rows * inputs + rows * blocks(inputs) * SCALE_BYTES
    weight = outputs * inputs + blocks(outputs) * blocks(inputs) * SCALE_BYTES
    return Work(2 * rows * outputs * inputs, read + weight + 2 * rows * outputs, FP8)


def gate_work(tokens: int, experts: int, choices: int) -> Work:
    """Float32 logits and the bias in; a float32 weight and an int64 id for each choice out."""
    return Work(0, 4 * tokens * experts + 4 * experts + 12 * tokens * choices)


def rows_work(rows: int, row_bytes_read: int, row_bytes_written: int, other_bytes: int = 0) -> Work:
    """What changes rows one by one, with so much read whatever their number."""
    return Work(0, rows * (row_bytes_read + row_bytes_written) + other_bytes)
