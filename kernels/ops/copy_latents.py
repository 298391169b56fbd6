"""Latents of any slots to one sendable buffer, and from such a buffer to slots, in all layers at once.

Where pages and buffer are of two formats the rows are packed or unpacked on their way: pages in bfloat16 can
be sent as FP8, and what came as bfloat16 can be kept as FP8.
"""

import torch

from kernels.ops.backend import runs_kernel
from kernels.ops.copy_latents_kernel import gather_latents_kernel, scatter_latents_kernel
from kernels.ops.fp8_sizes import packed_bytes
from kernels.ops.latent_format import pack_latents_reference, unpack_latents_reference


def gather_latents_reference(
    latents: torch.Tensor, slots: torch.Tensor, out: torch.Tensor, value_dim: int
) -> None:
    """What `gather_latents` does, in torch."""
    tokens, slots = _used(slots)
    out[..., tokens, :] = _converted(latents.index_select(-2, slots), out.dtype, value_dim)


def scatter_latents_reference(
    rows: torch.Tensor, slots: torch.Tensor, latents: torch.Tensor, value_dim: int
) -> None:
    """What `scatter_latents` does, in torch."""
    tokens, slots = _used(slots)
    latents.index_copy_(-2, slots, _converted(rows[..., tokens, :], latents.dtype, value_dim))


def gather_latents(latents: torch.Tensor, slots: torch.Tensor, out: torch.Tensor, value_dim: int) -> None:
    """Fill `out [layers, tokens, row]` with what `latents [layers, slots, row]` hold in `slots [tokens]`.

    Both may lack the layers. Rows are numbers, `value_dim` and then the rotated key, or uint8, packed FP8; of
    two formats one is uint8. Negative slots (int64 or int32) are skipped: their rows of `out` stay as they
    are. Raises ValueError for rows that do not fit each other.
    """
    _check(latents, out, slots, out.shape[-2], value_dim)
    run = gather_latents_kernel if runs_kernel(out) else gather_latents_reference
    run(latents, slots, out, value_dim)


def scatter_latents(rows: torch.Tensor, slots: torch.Tensor, latents: torch.Tensor, value_dim: int) -> None:
    """Put `rows [layers, tokens, row]` into `slots [tokens]` of `latents [layers, slots, row]`.

    The way back of `gather_latents`, with its formats; slots that are not negative differ from each other.
    """
    _check(rows, latents, slots, rows.shape[-2], value_dim)
    run = scatter_latents_kernel if runs_kernel(latents) else scatter_latents_reference
    run(rows, slots, latents, value_dim)


def _used(slots: torch.Tensor) -> tuple["slice | torch.Tensor", torch.Tensor]:
    """Which tokens have slots, as a slice if all have; and these slots."""
    used = slots >= 0
    return (slice(None), slots.long()) if used.all() else (used, slots[used].long())


def _converted(rows: torch.Tensor, dtype: torch.dtype, value_dim: int) -> torch.Tensor:
    if rows.dtype == dtype:
        return rows
    flat = rows.flatten(0, -2)
    if dtype == torch.uint8:
        flat = pack_latents_reference(flat, value_dim)
    else:
        flat = unpack_latents_reference(flat, value_dim, dtype)
    return flat.view(*rows.shape[:-1], flat.shape[-1])


def _check(
    source: torch.Tensor, target: torch.Tensor, slots: torch.Tensor, tokens_count: int, value_dim: int
) -> None:
    sizes = {source.dtype: source.shape[-1], target.dtype: target.shape[-1]}
    if len(sizes) == 1:
        fits = source.shape[-1] == target.shape[-1]
    else:
        packed = sizes.pop(torch.uint8, None)
        numbers = sizes.popitem()[1]
        fits = packed == packed_bytes(value_dim, numbers - value_dim) and value_dim % 4 == 0
    if not fits or source.shape[:-2] != target.shape[:-2] or slots.shape != (tokens_count,):
        raise ValueError(
            f"{source.dtype} {list(source.shape)} does not become {target.dtype} {list(target.shape)} by "
            f"{list(slots.shape)} slots and {value_dim} numbers of value: give the same layers and tokens, "
            "and rows of one format, or numbers (of value a multiple of 4) and packed_bytes of uint8"
        )
