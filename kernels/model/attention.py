"""Multi-head latent attention (arXiv 2405.04434, section 2.1): two forms over one set of weights.

`expand` unfolds latents into the keys and values of every head, for a prompt; `absorb` folds the unfolding
into queries and outputs instead and attends over the latents themselves, for one token a request.
"""

from dataclasses import dataclass

import torch

from kernels.model.config import ModelConfig
from kernels.model.layers import Weights, softmax_scale
from kernels.ops.linear import linear, linear_by_head, packed
from kernels.ops.mla_decode import mla_decode
from kernels.ops.mla_prefill import mla_prefill
from kernels.ops.rms_norm import rms_norm
from kernels.ops.rotary import rotate


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines `[tokens, qk_rope_head_dim / 2]` of the tokens of a step, the same in every layer."""

    cosines: torch.Tensor
    sines: torch.Tensor


class LatentAttention:
    """One layer's attention half, of which each token leaves only `latent_dim` numbers behind."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        self.config = config
        self.scale = softmax_scale(config)
        prefix = f"model.layers.{layer}.self_attn."
        first_query = "q_proj" if config.q_lora_rank is None else "q_a_proj"
        down = torch.cat([weights[f"{prefix}{name}.weight"] for name in (first_query, "kv_a_proj_with_mqa")])
        self._down = packed(down)
        self._down_bias = self._first_bias(weights, prefix, first_query, down.shape[0])
        if config.q_lora_rank is not None:
            self._query_norm = weights[f"{prefix}q_a_layernorm.weight"]
            self._query_up = packed(weights[f"{prefix}q_b_proj.weight"])
        self._latent_norm = weights[f"{prefix}kv_a_layernorm.weight"]
        latent_up = weights[f"{prefix}kv_b_proj.weight"].contiguous()
        self._latent_up = packed(latent_up)
        by_head = latent_up.view(config.heads_count, -1, config.kv_lora_rank)
        self._key_up = by_head[:, : config.qk_nope_head_dim].transpose(1, 2).contiguous()
        self._value_up = by_head[:, config.qk_nope_head_dim :].contiguous()
        self._out = packed(weights[f"{prefix}o_proj.weight"])
        self._out_bias = weights.get(f"{prefix}o_proj.bias")

    @staticmethod
    def _first_bias(
        weights: Weights, prefix: str, first_query: str, outputs_count: int
    ) -> torch.Tensor | None:
        latent_bias = weights.get(f"{prefix}kv_a_proj_with_mqa.bias")
        if latent_bias is None:
            return None
        query_bias = weights.get(f"{prefix}{first_query}.bias")
        if query_bias is None:
            query_bias = latent_bias.new_zeros(outputs_count - latent_bias.shape[0])
        return torch.cat([query_bias, latent_bias])

    def compress(self, hidden: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[tokens, heads, nope + rope]` and latents `[tokens, latent_dim]` of `hidden`."""
        config = self.config
        down = linear(hidden, self._down, self._down_bias)
        query, latent = down[:, : -config.latent_dim], down[:, -config.latent_dim :].contiguous()
        if config.q_lora_rank is not None:
            query = linear(rms_norm(query, self._query_norm, config.latent_norm_eps), self._query_up)
        queries = query.unflatten(1, (config.heads_count, config.qk_head_dim))
        self._rotate(queries[..., config.qk_nope_head_dim :], rotation)
        value, key = latent[:, : config.kv_lora_rank], latent[:, config.kv_lora_rank :]
        rms_norm(value, self._latent_norm, config.latent_norm_eps, out=value)
        self._rotate(key.unsqueeze(1), rotation)
        return queries, latent

    def expand(self, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Causal attention of a prompt's last chunk over `context [context, latent_dim]`, which ends with it.

        The result, `[chunk, heads * v]`, goes into `project`.
        """
        config = self.config
        value, key = context.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        unfolded = linear(value, self._latent_up).view(context.shape[0], config.heads_count, -1)
        content, values = unfolded.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        position = key.unsqueeze(1).expand(-1, config.heads_count, -1)
        keys = torch.cat([content, position], dim=-1)
        return mla_prefill(queries, keys, values, self.scale).flatten(1)

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
        return linear(attended, self._out, self._out_bias)

    def _rotate(self, hidden: torch.Tensor, rotation: Rotation) -> None:
        rotate(hidden, rotation.cosines, rotation.sines, self.config.rope.interleaved)
