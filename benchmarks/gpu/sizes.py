"""Dimensions of DeepSeek-V3 (arXiv 2412.19437, section 4.2), and how many of everything the cases take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Of a model."""

    hidden: int = 7168
    layers: int = 61
    heads: tuple[int, ...] = (128, 16)
    value: int = 512
    position: int = 64
    content: int = 128
    head_value: int = 128
    experts: tuple[int, ...] = (32, 256)
    intermediate: int = 2048
    choices: int = 8
    groups: int = 8
    groups_kept: int = 4
    vocab: int = 129280
    linears: tuple[tuple[int, int], ...] = ((2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168))
    """`[out, in]`: both first projections of attention, queries' second, attention's last, a dense MLP's."""

    @property
    def latent(self) -> int:
        """Numbers of a token's latent."""
        return self.value + self.position


@dataclass(frozen=True, slots=True)
class Counts:
    """Of requests, tokens and rows."""

    decode_requests: tuple[int, ...] = (128, 1, 32, 8)
    decode_contexts: tuple[int, ...] = (4096, 16384, 1024, 65536)
    expert_tokens: tuple[int, ...] = (128, 1, 8, 32, 512)
    gate_tokens: tuple[int, ...] = (1, 128, 4096)
    prefill_tokens: tuple[int, ...] = (4096, 1024, 2048, 8192, 16384, 32768)
    rows: tuple[int, ...] = (1, 128, 4096)
    latents_tokens: tuple[int, ...] = (1, 128, 4096)
    sample_rows: tuple[int, ...] = (1, 128)


V3 = Dimensions()
WHOLE = Counts()
QUICK = Counts((128, 1), (4096,), (128, 8), (1, 128), (4096,), (128,), (128, 4096), (128,))

TINY = Dimensions(
    hidden=128,
    layers=2,
    heads=(2,),
    value=32,
    position=16,
    content=16,
    head_value=16,
    experts=(4,),
    intermediate=128,
    choices=2,
    groups=2,
    groups_kept=1,
    vocab=300,
    linears=((128, 128),),
)
FEW = Counts((2,), (70,), (3,), (2,), (70,), (2,), (3,), (2,))
