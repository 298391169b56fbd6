"""What every actor of a cluster is told when it starts."""

from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from kernels.model.config import ModelConfig
from kernels.model.pages import PAGE_TOKENS

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Place:
    """The configuration, the channels' secret, and a folder for unix sockets that only this user enters."""

    config: ClusterConfig
    secret: str = field(repr=False)
    sockets_folder: str

    def address(self, name: str) -> str:
        """Where a member of this name listens."""
        if self.config.transport.scheme == "unix":
            return f"unix://{self.sockets_folder}/{name}.sock"
        return f"tcp://{self.config.transport.host}:0"


def context_tokens_max(model: ModelConfig, config: ClusterConfig) -> int:
    """Prompt and output of a request: what the model was made for, and what any one node can hold."""
    item_bytes = ITEM_BYTES[config.model.compute_dtype]
    page_bytes = model.layers_count * PAGE_TOKENS * model.latent_dim * item_bytes
    smallest_bytes = min(config.prefill.latents_bytes, config.decode.latents_bytes)
    return min(model.positions_max, smallest_bytes // page_bytes * PAGE_TOKENS)
