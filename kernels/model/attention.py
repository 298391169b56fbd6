"""Multi-head latent attention (arXiv 2405.04434, section 2.1): two forms over one set of weights.

`expand` unfolds latents into the keys and values of every head, for a prompt; `absorb` folds the unfolding
into queries and outputs instead and attends over the latents themselves, for one token a request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.model.config import ModelConfig
from kernels.model.layers import Weights, softmax_scale
from kernels.ops.copy_latents import gather_latents
from kernels.ops.latent_format import unpack_latents_reference
from kernels.ops.linear import linear_by_head, packed_by_head
from kernels.ops.merge_attention import merge_attention
from kernels.ops.mla_decode import mla_decode
from kernels.ops.mla_prefill import mla_prefill, mla_prefill_ragged
from kernels.ops.projection import Rows, joined, normed_for, plain, prepared, project
from kernels.ops.rotary import rotate
from kernels.ops.write_latents import write_latents


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines `[tokens, qk_rope_head_dim / 2]` of the tokens of a step, the same in every layer."""

    cosines: torch.Tensor
    sines: torch.Tensor


@dataclass(frozen=True, slots=True)
class KeyWindow:
    """A window of several prompts' contexts: the slots of its tokens, one prompt's after the other's."""

    slots: torch.Tensor
    """`[tokens]` int64."""
    starts: torch.Tensor
    """Where each prompt's tokens begin, `[prompts + 1]` int32."""
    is_causal: bool
    """Whether it ends with the prompts' queries, which then do not see what comes after them."""


@dataclass(frozen=True, slots=True)
class WindowedQueries:
    """Consecutive rows of a step, of several prompts, and the windows that they attend to in turn."""

    rows: slice
    starts: torch.Tensor
    """Where each prompt's queries begin, from the first of these rows on, `[prompts + 1]` int32."""
    tokens_max: int
    """Queries of a prompt at most."""
    windows: Sequence[KeyWindow]


class LatentAttention:
    """One layer's attention half, of which each token leaves only `latent_dim` numbers behind."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        self.config = config
        self.scale = softmax_scale(config)
        prefix = f"model.layers.{layer}.self_attn."
        first_query = "q_proj" if config.q_lora_rank is None else "q_a_proj"
        dtype = weights[f"{prefix}kv_a_layernorm.weight"].dtype
        names = (first_query, "kv_a_proj_with_mqa")
        self._down = prepared(joined([weights[f"{prefix}{name}.weight"] for name in names], dtype))
        self._down_bias = self._first_bias(config, weights, prefix, first_query)
        if config.q_lora_rank is not None:
            self._query_norm = weights[f"{prefix}q_a_layernorm.weight"]
            self._query_up = prepared(weights[f"{prefix}q_b_proj.weight"])
        self._latent_norm = weights[f"{prefix}kv_a_layernorm.weight"]
        latent_up = weights[f"{prefix}kv_b_proj.weight"]
        self._latent_up = prepared(latent_up)
        by_head = plain(latent_up, dtype).contiguous().view(config.heads_count, -1, config.kv_lora_rank)
        self._key_up = packed_by_head(by_head[:, : config.qk_nope_head_dim].transpose(1, 2))
        self._value_up = packed_by_head(by_head[:, config.qk_nope_head_dim :])
        self._out = prepared(weights[f"{prefix}o_proj.weight"])
        self._out_bias = weights.get(f"{prefix}o_proj.bias")

    @staticmethod
    def _first_bias(
        config: ModelConfig, weights: Weights, prefix: str, first_query: str
    ) -> torch.Tensor | None:
        latent_bias = weights.get(f"{prefix}kv_a_proj_with_mqa.bias")
        if latent_bias is None:
            return None
        query_bias = weights.get(f"{prefix}{first_query}.bias")
        if query_bias is None:
            rank = config.q_lora_rank
            query_bias = latent_bias.new_zeros(rank or config.heads_count * config.qk_head_dim)
        return torch.cat([query_bias, latent_bias])

    def normed(self, hidden: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float) -> Rows:
        """Norm of `residual [tokens, hidden]`, which grows by `hidden`, as `compress` takes it."""
        return normed_for(self._down, hidden, norm, eps, residual)

    def compress(self, hidden: Rows, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[tokens, heads, nope + rope]` and latents `[tokens, latent_dim]` of `hidden`.

        The latents are as they were projected: `store` makes of them what is attended to.
        """
        config = self.config
        down = project(hidden, self._down, self._down_bias)
        query, latent = down[:, : -config.latent_dim], down[:, -config.latent_dim :]
        if config.q_lora_rank is not None:
            normed = normed_for(self._query_up, query, self._query_norm, config.latent_norm_eps)
            query = project(normed, self._query_up)
        queries = query.unflatten(1, (config.heads_count, config.qk_head_dim))
        rotate(
            queries[..., config.qk_nope_head_dim :],
            rotation.cosines,
            rotation.sines,
            config.rope.interleaved,
        )
        return queries, latent

    def store(
        self, latent: torch.Tensor, rotation: Rotation, latents: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Norm and turn `latent [tokens, latent_dim]`, into `slots [tokens]` of `latents [slots, row]`."""
        config = self.config
        eps, turns = config.latent_norm_eps, (rotation.cosines, rotation.sines, config.rope.interleaved)
        write_latents(latent, self._latent_norm, eps, *turns, slots, latents)

    def expand(self, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Causal attention of a prompt's last chunk over `context [context, row]`, which ends with it.

        The result, `[chunk, heads * v]`, goes into `project`.
        """
        config = self.config
        if context.dtype == torch.uint8:
            context = unpack_latents_reference(context, config.kv_lora_rank, queries.dtype)
        value, key = context.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        unfolded = project(value, self._latent_up).view(context.shape[0], config.heads_count, -1)
        content, values = unfolded.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        position = key.unsqueeze(1).expand(-1, config.heads_count, -1)
        keys = torch.cat([content, position], dim=-1)
        return mla_prefill(queries, keys, values, self.scale).flatten(1)

    def expand_windows(
        self, queries: torch.Tensor, latents: torch.Tensor, asked: Sequence[WindowedQueries]
    ) -> torch.Tensor:
        """As `expand`, of many prompts' chunks over their contexts in one layer's `latents [slots, row]`."""
        parts = [self._expand_some(queries[some.rows], latents, some) for some in asked]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _expand_some(
        self, queries: torch.Tensor, latents: torch.Tensor, asked: WindowedQueries
    ) -> torch.Tensor:
        merged = None
        for window in asked.windows:
            keys, position, values = self._unfold(latents, window.slots, queries.dtype)
            bounds = (asked.starts, window.starts, self.scale, window.is_causal, asked.tokens_max)
            part = mla_prefill_ragged(queries, keys, position, values, *bounds)
            merged = part if merged is None else merge_attention(*merged, *part, in_place=True)
        return merged[0].flatten(1)

    def _unfold(
        self, latents: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys without position `[tokens, heads, nope]`, positions `[tokens, rope]`, values of some slots."""
        config = self.config
        rows = torch.empty(len(slots), config.latent_dim, dtype=dtype, device=latents.device)
        gather_latents(latents, slots, rows, config.kv_lora_rank)
        value, position = rows.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        unfolded = project(value, self._latent_up).unflatten(1, (config.heads_count, -1))
        keys, values = unfolded.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return keys, position, values

    def absorb(
        self, queries: torch.Tensor, latents: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one token of each request over one layer's `latents`; arguments as in `mla_decode`."""
        config = self.config
        content, position = queries.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        folded = torch.cat([linear_by_head(content, self._key_up), position], dim=-1)
        mixed = mla_decode(folded, latents, pages, lengths, config.kv_lora_rank, self.scale)
        return linear_by_head(mixed, self._value_up).flatten(1)

    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """All heads' outputs `[tokens, heads * v]` back to `[tokens, hidden]`."""
        return project(attended, self._out, self._out_bias)
