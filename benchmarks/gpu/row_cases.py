"""What is done to each row by itself: gate, FP8 products, norms, latents in and out of pages, sampling."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu.case import Case, Ready, relative_error, share_differing
from benchmarks.gpu.draw import integers, normal, shuffled
from benchmarks.gpu.row_peers import GateInputs, gate_peers, linear_peers, sample_peers
from benchmarks.gpu.sizes import Counts, Dimensions
from benchmarks.gpu.timing import Waits
from benchmarks.gpu.work import gate_work, linear_fp8_work, rows_work
from kernels.ops.copy_latents import gather_latents, gather_latents_reference
from kernels.ops.draw_kernel import draw_kernel
from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.gate import gate_noaux_tc, gate_noaux_tc_reference
from kernels.ops.linear_fp8 import WEIGHT_BLOCK, Fp8Weight, linear_fp8
from kernels.ops.quantize import ROW_BLOCK, dequantize_blocks, quantize_rows
from kernels.ops.rms_norm import (
    add_rms_norm_quantize,
    add_rms_norm_quantize_reference,
    rms_norm,
    rms_norm_reference,
)
from kernels.ops.sample import SampleRow, sample, uniform
from kernels.ops.sample_kernel import best_kernel
from kernels.ops.write_latents import write_latents, write_latents_reference

EPS = 1e-6
SCALING = 2.5
# Of weights: where two groups are nearly as good, a score's last bit may put one's experts in the other's
# place, in one run of twenty at 4,096 tokens. A wrong gate differs in most tokens.
GATE_TOLERANCE = 1e-2
TOP_P, TEMPERATURE = 0.9, 1.0
FREE_SLOTS = 2  # slots in pages for each that is used


def gate_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """V3's gate."""
    for tokens in counts.gate_tokens:
        sizes = f"{tokens} tokens, {dims.choices} of {dims.experts[-1]}"
        yield Case("gate", sizes, partial(ready_gate, dims, tokens))


def ready_gate(dims: Dimensions, tokens: int, device: torch.device) -> Ready:
    """Logits to weights and ids; the error is that of the weights."""
    experts = dims.experts[-1]
    logits = normal((tokens, experts), torch.float32, device)
    bias = 0.01 * normal((experts,), torch.float32, device)
    inputs = GateInputs(logits, bias, dims.choices, dims.groups, dims.groups_kept, True, SCALING)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return gate_noaux_tc(*inputs)

    def error() -> float:
        return relative_error(run()[0], gate_noaux_tc_reference(*inputs)[0])

    return Ready(run, gate_work(tokens, experts, dims.choices), error, gate_peers(inputs), GATE_TOLERANCE)


def linear_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """Products by V3's weights."""
    for outputs, inputs in dims.linears:
        for rows in counts.rows:
            make = partial(ready_linear, outputs, inputs, rows)
            yield Case("linear_fp8", f"{rows} rows by {outputs} x {inputs}", make)


def ready_linear(outputs: int, inputs: int, rows: int, device: torch.device) -> Ready:
    """Rows that are FP8 already."""
    weight = Fp8Weight.of(0.02 * normal((outputs, inputs), torch.bfloat16, device))
    hidden = normal((rows, inputs), torch.bfloat16, device)
    given = (*quantize_rows(hidden), weight.weight, weight.scales, torch.bfloat16)
    wide = dequantize_blocks(*given[:2], ROW_BLOCK)

    def run() -> torch.Tensor:
        return linear_fp8(*given)

    def error() -> float:
        # by torch itself: the reference of `linear_fp8` is a product of our own kernel on a GPU
        return relative_error(run(), wide @ dequantize_blocks(*given[2:4], WEIGHT_BLOCK).T)

    return Ready(run, linear_fp8_work(rows, outputs, inputs), error, linear_peers(hidden, *given[:4]))


def norm_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """Alone; and with the sum before it and FP8 behind it."""
    for rows in counts.rows:
        yield Case("rms_norm", f"{rows} rows of {dims.hidden}", partial(ready_norm, dims.hidden, rows))
        sizes = f"add, norm, FP8: {rows} rows of {dims.hidden}"
        yield Case("rms_norm", sizes, partial(ready_norm_quantize, dims.hidden, rows))


def ready_norm(size: int, rows: int, device: torch.device) -> Ready:
    """The plain norm."""
    hidden, weight = normal((rows, size), torch.bfloat16, device), normal((size,), torch.bfloat16, device)

    def run() -> torch.Tensor:
        return rms_norm(hidden, weight, EPS)

    def error() -> float:
        return relative_error(run(), rms_norm_reference(hidden, weight, EPS))

    peers = {"torch": lambda: lambda: functional.rms_norm(hidden, weight.shape, weight, EPS)}
    return Ready(run, rows_work(rows, 2 * size, 2 * size, 2 * size), error, peers)


def ready_norm_quantize(size: int, rows: int, device: torch.device) -> Ready:
    """The residual grows with every call, by little beside its start."""
    hidden = 0.001 * normal((rows, size), torch.bfloat16, device)
    residual, weight = normal((rows, size), torch.bfloat16, device), normal((size,), torch.bfloat16, device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm_quantize(hidden, residual, weight, EPS)

    def error() -> float:
        start = residual.clone()
        return relative_error(run()[1], add_rms_norm_quantize_reference(hidden, start, weight, EPS)[1])

    peers = {"torch": lambda: lambda: add_rms_norm_quantize_reference(hidden, residual, weight, EPS)}
    work = rows_work(rows, 4 * size, 3 * size + 4 * -(-size // 128), 2 * size)
    return Ready(run, work, error, peers, 2e-2)


def latents_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """Into pages, and out of the pages of all layers."""
    packed = packed_bytes(dims.value, dims.position)
    numbers = {"bf16": (torch.bfloat16, dims.latent), "FP8": (torch.uint8, packed)}
    for tokens in counts.latents_tokens:
        for name, row in numbers.items():
            make = partial(ready_write, dims, tokens, *row)
            yield Case("write_latents", f"{tokens} tokens to {name}", make)
        for source, target in (("bf16", "bf16"), ("bf16", "FP8"), ("FP8", "FP8")):
            sizes = f"{tokens} tokens of {dims.layers} layers, {source} to {target}"
            rows = (*numbers[source], *numbers[target])
            yield Case("copy_latents", sizes, partial(ready_gather, dims, tokens, *rows))


def ready_write(
    dims: Dimensions, tokens: int, dtype: torch.dtype, row_size: int, device: torch.device
) -> Ready:
    """Norm, turn and write."""
    down = normal((tokens, dims.latent), torch.bfloat16, device)
    weight = normal((dims.value,), torch.bfloat16, device)
    turns = [normal((tokens, dims.position // 2), torch.float32, device) for _ in range(2)]
    slots = shuffled(FREE_SLOTS * tokens, device)[:tokens]
    latents, expected = (
        torch.zeros(FREE_SLOTS * tokens, row_size, dtype=dtype, device=device) for _ in range(2)
    )
    given = (down, weight, EPS, *turns, True, slots)
    read = 2 * dims.latent + 4 * dims.position + 8
    work = rows_work(tokens, read, row_size * dtype.itemsize, 2 * dims.value)

    def run() -> None:
        write_latents(*given, latents)

    def error() -> float:
        run()
        write_latents_reference(*given, expected)
        compare = share_differing if dtype == torch.uint8 else relative_error
        return compare(latents, expected)

    peers = {"torch": lambda: Waits(lambda: write_latents_reference(*given, latents))}
    return Ready(run, work, error, peers, 5e-2 if dtype == torch.uint8 else 1e-2)


def ready_gather(
    dims: Dimensions,
    tokens: int,
    dtype: torch.dtype,
    row_size: int,
    target_dtype: torch.dtype,
    target_size: int,
    device: torch.device,
) -> Ready:
    """A prompt's latents of all layers to one buffer that can be sent."""
    shape = (dims.layers, FREE_SLOTS * tokens, row_size)
    if dtype == torch.uint8:
        latents = integers(120, shape, device).to(dtype)  # any bytes: they are only carried
    else:
        latents = normal(shape, dtype, device)
    slots = shuffled(FREE_SLOTS * tokens, device)[:tokens]
    out, expected = (
        torch.zeros(dims.layers, tokens, target_size, dtype=target_dtype, device=device) for _ in range(2)
    )
    row_bytes = (row_size * dtype.itemsize, target_size * target_dtype.itemsize)
    work = rows_work(dims.layers * tokens, *row_bytes, 8 * tokens)

    def run() -> None:
        gather_latents(latents, slots, out, dims.value)

    def error() -> float:
        run()
        gather_latents_reference(latents, slots, expected, dims.value)
        return share_differing(out.view(torch.uint8), expected.view(torch.uint8))

    return Ready(run, work, error, {"torch": lambda: lambda: latents.index_select(1, slots)}, 1e-3)


def sample_cases(dims: Dimensions, counts: Counts) -> Iterator[Case]:
    """What a step's sampling takes on the device."""
    for rows in counts.sample_rows:
        for name, top_p in (("greedy", None), ("drawn", 1.0), (f"top-p {TOP_P}", TOP_P)):
            make = partial(ready_sample, dims.vocab, rows, top_p)
            yield Case("sample", f"{name}, {rows} rows of {dims.vocab}", make)


def ready_sample(vocab: int, rows: int, top_p: float | None, device: torch.device) -> Ready:
    """The kernels of `sample`, without its copy to the host; the tokens are compared with a CPU's."""
    logits = 3 * normal((rows, vocab), torch.float32, device)
    temperature = 0.0 if top_p is None else TEMPERATURE
    asked = [SampleRow(row, row, temperature, top_p=top_p or 1.0) for row in range(rows)]
    told = [(temperature, 0, top_p or 1.0, 0.0, uniform(row, row)) for row in range(rows)]
    told = torch.tensor(told, dtype=torch.float64, device=device)

    def run() -> torch.Tensor:
        best, token_ids = best_kernel(logits)
        if top_p is not None:
            draw_kernel(logits, best, token_ids, told, top_p < 1)
        return token_ids

    def error() -> float:
        expected = torch.tensor(sample(logits.cpu().clone(), asked).token_ids)
        return share_differing(run(), expected)

    work = rows_work(rows, 4 * vocab, 8)
    return Ready(run, work, error, sample_peers(logits, top_p, temperature), 0.0)
