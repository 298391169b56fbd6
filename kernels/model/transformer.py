"""The attention half of a model, its layers in order, with a socket for the routed experts."""

import copy
from collections.abc import Callable, Generator, Sequence

import torch

from kernels.model.attention import LatentAttention, Rotation
from kernels.model.checkpoint import Checkpoint, ProgressCallback
from kernels.model.config import ModelConfig
from kernels.model.latent_cache import LatentLayout
from kernels.model.layers import Weights, gated_weights, rope_frequencies, rope_scale
from kernels.model.moe import MixtureOfExperts, RoutedExperts
from kernels.model.tensor_names import attention_half_names
from kernels.ops.expert_mlp import gated_mlp
from kernels.ops.linear import linear, packed
from kernels.ops.projection import Rows, Weight, moved
from kernels.ops.rms_norm import add_rms_norm, rms_norm
from kernels.ops.rotary import rotation

Attend = Callable[[int, LatentAttention, Rows], torch.Tensor]
"""(layer, attention, normed hidden [tokens, hidden]) to attention's output before projection."""

Lane = Generator[None, None, torch.Tensor]
"""A micro-batch on its way through the layers; it pauses whenever its tokens travel to experts."""


class Layer:
    """One layer's weights."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        prefix = f"model.layers.{layer}."
        self.attention = LatentAttention(config, weights, layer)
        self.before_attention = weights[f"{prefix}input_layernorm.weight"]
        self.before_mlp = weights[f"{prefix}post_attention_layernorm.weight"]
        moe = config.is_moe_layer(layer)
        self.moe = MixtureOfExperts(config, weights, layer) if moe else None
        self.dense = None if moe else gated_weights(weights, f"{prefix}mlp.", self.before_mlp.dtype)


class Transformer:
    """Hidden states from tokens, and logits from hidden states; who attends to what is the caller's."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Weight],
        routed: RoutedExperts,
        device: torch.device | str = "cpu",
    ):
        """Layers take their weights out of `weights`, for packed ones are copies."""
        self.config = config
        self.routed = routed
        self.layers: list[Layer] = []
        for layer in range(config.layers_count):
            names = [name for name in weights if name.startswith(f"model.layers.{layer}.")]
            own = {name: moved(weights.pop(name), device) for name in names}
            self.layers.append(Layer(config, own, layer))
        self._embedding = weights["model.embed_tokens.weight"].to(device)
        self._norm = weights["model.norm.weight"].to(device)
        self._head = packed(self._embedding if config.tied_head else weights["lm_head.weight"].to(device))
        self._frequencies = rope_frequencies(config.rope, config.qk_rope_head_dim).to(device)
        self._rope_scale = rope_scale(config.rope)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        routed: RoutedExperts,
        on_progress: ProgressCallback | None = None,
        device: torch.device | str = "cpu",
        keeps_fp8: bool = False,
    ) -> "Transformer":
        """Load everything but the routed experts, computed in `dtype`; raises CheckpointError.

        Weights in FP8 become `dtype` too unless `keeps_fp8`.
        """
        names = attention_half_names(checkpoint.config)
        return cls(checkpoint.config, checkpoint.load(names, dtype, on_progress, keeps_fp8), routed, device)

    def plugged_into(self, routed: RoutedExperts) -> "Transformer":
        """The same weights with other routed experts: a further node in this process costs no memory."""
        twin = copy.copy(self)
        twin.routed = routed
        return twin

    @property
    def dtype(self) -> torch.dtype:
        """The type that hidden states and latents are computed in."""
        return self._embedding.dtype

    def latent_layout(self, packs_latents: bool) -> LatentLayout:
        """How its latents lie in memory: in its own numbers, or as FP8."""
        config, dtype = self.config, torch.uint8 if packs_latents else self.dtype
        return LatentLayout(config.kv_lora_rank, config.qk_rope_head_dim, dtype)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._embedding.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[tokens, hidden]` of `token_ids [tokens]`, as they enter the first layer."""
        return self._embedding[token_ids]

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """How the tokens at `positions [tokens]` are turned, in every layer."""
        return Rotation(*rotation(positions, self._frequencies, self._rope_scale))

    def lane(self, hidden: torch.Tensor, attend: Attend, routed: RoutedExperts) -> Lane:
        """Carry `hidden [tokens, hidden]` through all layers, in place, pausing while experts have it."""
        eps = self.config.rms_norm_eps
        added = torch.zeros_like(hidden)
        for index, layer in enumerate(self.layers):
            normed = layer.attention.normed(added, hidden, layer.before_attention, eps)
            added = layer.attention.project(attend(index, layer.attention, normed))
            normed = add_rms_norm(added, hidden, layer.before_mlp, eps)
            if layer.moe is None:
                added = gated_mlp(normed, layer.dense)
                continue
            pending = layer.moe.dispatch(normed, routed)
            shared = layer.moe.shared(normed)
            yield
            mixed = pending.combine()
            added = (mixed if shared is None else mixed + shared).to(hidden.dtype)
        return hidden.add_(added)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, `[rows, vocab]` float32, of the last layer's `hidden [rows, hidden]`."""
        return linear(rms_norm(hidden, self._norm, self.config.rms_norm_eps), self._head).float()


def run_lanes(lanes: Sequence[Lane]) -> list[torch.Tensor]:
    """Advance lanes in turn, so that one computes while another's tokens travel; results in order."""
    results: list[torch.Tensor | None] = [None] * len(lanes)
    waiting = list(enumerate(lanes))
    while waiting:
        still: list[tuple[int, Lane]] = []
        for index, lane in waiting:
            try:
                next(lane)
                still.append((index, lane))
            except StopIteration as finished:
                results[index] = finished.value
        waiting = still
    return results
