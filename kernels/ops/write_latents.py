"""What a token leaves behind in one layer, made and put into its slot: norm, turn, FP8 and write in one.

The pages are all that is written: attention reads them, and who sends latents gathers them from there
(`copy_latents`), for all layers at once if it likes.
"""

import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.copy_latents import scatter_latents
from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.latent_format import pack_latents_reference
from kernels.ops.rms_norm import rms_norm, rms_norm_reference
from kernels.ops.rotary import rotate, rotate_reference
from kernels.ops.write_latents_kernel import write_latents_kernel


def write_latents_reference(
    down: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    interleaved: bool,
    slots: torch.Tensor,
    latents: torch.Tensor,
) -> None:
    """What `write_latents` does, in torch."""
    used = slots >= 0
    value_dim = norm_weight.shape[0]
    value = rms_norm_reference(down[used, :value_dim], norm_weight, eps).to(down.dtype)
    position = down[used, value_dim:].unsqueeze(1)
    turned = rotate_reference(position, cosines[used], sines[used], interleaved).squeeze(1)
    rows = torch.cat([value, turned], dim=1)
    packs = latents.dtype == torch.uint8
    latents[slots[used]] = pack_latents_reference(rows, value_dim) if packs else rows.to(latents.dtype)


def write_latents(
    down: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    interleaved: bool,
    slots: torch.Tensor,
    latents: torch.Tensor,
) -> None:
    """Norm the value part of `down [tokens, value + position]`, turn the rest, put rows into their slots.

    `norm_weight [value]`; `cosines` and `sines [tokens, position / 2]` float32; `slots [tokens]` int64, of
    which negative ones are skipped and others differ; `latents [slots, value + position]` bfloat16 or
    float32, or `[slots, packed_bytes]` uint8, packed FP8. Raises ValueError for rows that do not fit.
    """
    _check(down, norm_weight, cosines, sines, slots, latents)
    if runs_kernel(down):
        write_latents_kernel(down, norm_weight, eps, cosines, sines, interleaved, slots, latents)
        return
    rows = down.clone(memory_format=torch.contiguous_format)
    value, position = rows.tensor_split([norm_weight.shape[0]], dim=1)
    rms_norm(value, norm_weight, eps, out=value)
    rotate(position.unsqueeze(1), cosines, sines, interleaved)
    rows = rows if latents.dtype == torch.uint8 else rows.to(latents.dtype)
    scatter_latents(rows, slots, latents, norm_weight.shape[0])


def _check(
    down: torch.Tensor,
    norm_weight: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    slots: torch.Tensor,
    latents: torch.Tensor,
) -> None:
    tokens_count, size = down.shape
    value_dim = norm_weight.shape[0]
    turns = (tokens_count, (size - value_dim) // 2)
    if not cosines.shape == sines.shape == turns or slots.shape != (tokens_count,):
        raise ValueError(
            f"turns of {list(cosines.shape)} or slots of {list(slots.shape)} do not fit rows of "
            f"{list(down.shape)}, of which {value_dim} are value: give both for every token"
        )
    packs = latents.dtype == torch.uint8
    row = packed_bytes(value_dim, size - value_dim) if packs else size
    if latents.shape[1:] != (row,) or (packs and value_dim % 4):
        raise ValueError(
            f"slots of {list(latents.shape[1:])} {latents.dtype} do not hold {value_dim} numbers of value "
            f"and {size - value_dim} of position: give [{row}], and in FP8 a multiple of 4 as value"
        )
