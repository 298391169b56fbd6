"""Steps of a truncated model, timed: prompts from their beginning, requests in the middle of their output."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from benchmarks.gpu.draw import choices, integers, normal
from benchmarks.gpu.timing import DeviceTimer, HostTimer, elapsed_us, timed
from benchmarks.gpu.v3_model import SilentExperts, first_layers
from decode.graphs import CudaRecorder
from decode.messages import ReservePages, SamplingParameters
from decode.request import DecodeRequest
from decode.step import DecodeStep
from experts.banked import BankedExperts
from kernels.model.config import ModelConfig
from kernels.model.latent_cache import LatentCache
from kernels.model.pages import PAGE_TOKENS
from kernels.model.transformer import Transformer
from kernels.ops.expert_bank import ExpertBank
from prefill.messages import PrefillPrompt
from prefill.request import Chunk, PrefillRequest
from prefill.step import PrefillStep

WARM_STEPS, TIMED_STEPS = 2, 7
Step = Callable[[], torch.Tensor]


class StepClock:
    """Median time of a whole step, from the host's first word to the device's last."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"

    def measure_us(self, step: Step) -> float:
        """On a GPU of seven steps after some; else of one. Raises ArithmeticError as `check` does."""
        if not self._is_cuda:
            begin = time.perf_counter()
            logits = step()
            us = 1e6 * (time.perf_counter() - begin)
            check(logits)
            return us
        for _ in range(WARM_STEPS):
            check(step())
        return median(self._timed_us(step) for _ in range(TIMED_STEPS))

    def _timed_us(self, step: Step) -> float:
        torch.cuda.synchronize()
        pair = timed(step)
        torch.cuda.synchronize()
        return elapsed_us(pair)


class TruncatedModel:
    """A model, its pages, and shorter ones that share its weights."""

    def __init__(self, transformer: Transformer, cache: LatentCache, tokens_max: int, records: bool):
        """`records`: decode steps are recorded in CUDA graphs."""
        self.transformer, self.cache = transformer, cache
        self._records = records
        self._silent = SilentExperts(tokens_max, transformer.config.hidden_size, transformer.device)
        self._clock = StepClock(transformer.device)
        self._pages = list(range(cache.pool.pages_count))
        random.Random(20).shuffle(self._pages)

    def variants(self) -> dict[str, Transformer]:
        """No layers; dense ones; all, without and with routed experts: differences are times of layers."""
        model, dense = self.transformer, self.transformer.config.dense_layers_count
        silent = model.plugged_into(self._silent)
        return {
            "none": first_layers(model, 0),
            "dense": first_layers(model, dense),
            "half": silent,
            "whole": model,
        }

    def prefill_us(self, model: Transformer, tokens: int) -> float:
        """One prompt in one step."""
        pages = self._pages[: -(-tokens // PAGE_TOKENS)]
        token_ids = tuple(self._token_ids(tokens))
        asked = PrefillPrompt("prompt", 1, token_ids, tokens, SamplingParameters(), "")
        chunks = [Chunk(PrefillRequest(asked, None, 0.0, pages), 0, tokens)]
        step = PrefillStep(model, self.cache, micro_batches=1)
        return self._clock.measure_us(lambda: step.run(chunks, ignore))

    def decode_us(self, model: Transformer, requests: int, context: int) -> float:
        """One more token for requests that have so many, the newest included."""
        each = -(-context // PAGE_TOKENS)
        batch = [self._decode_request(number, each, context) for number in range(requests)]
        step = DecodeStep(model, self.cache, 1, CudaRecorder if self._records else None)
        if self._records and not step.prepare([requests]):
            raise RuntimeError(f"a step of {requests} requests cannot be recorded: the log says why")
        return self._clock.measure_us(lambda: step.run(batch))

    def _decode_request(self, number: int, pages_count: int, context: int) -> DecodeRequest:
        token_ids = self._token_ids(context)
        pages = self._pages[number * pages_count : (number + 1) * pages_count]
        asked = ReservePages(f"r{number}", 1, tuple(token_ids), context, SamplingParameters())
        request = DecodeRequest(asked, None, pages, 0.0, [], token_ids)
        request.page_table = torch.tensor(pages, dtype=torch.int32)
        return request

    def _token_ids(self, count: int) -> list[int]:
        return integers(self.transformer.config.vocab_size, (count,), self.transformer.device).tolist()


def check(logits: torch.Tensor) -> None:
    """Raises ArithmeticError for NaN and infinity: times of such steps would mean nothing."""
    if not bool(logits.isfinite().all()):
        raise ArithmeticError("the step's logits hold NaN or infinity")


def ignore(*_: object) -> None:
    """Latents are not sent anywhere."""


def shard_us(config: ModelConfig, bank: ExpertBank, slots: int, timer: DeviceTimer | HostTimer) -> float:
    """A shard's part of one layer: so many slots grouped, computed and weighed; weights come from memory."""
    device, experts = bank.down.device, len(bank.down)
    held = BankedExperts(replace(config, routed_experts_count=experts), {0: bank})
    hidden = normal((slots, config.hidden_size), torch.bfloat16, device)
    ids = choices(slots, experts, 1, device)
    weights = torch.ones(slots, 1, device=device)
    return timer.measure(lambda: held.dispatch(0, hidden, ids, weights).combine()).us
