"""How evenly a placement spreads a load over shards, in the three conventions of the field."""

from dataclasses import dataclass

import numpy as np

from experts.messages import Homes


@dataclass(frozen=True, slots=True)
class Balance:
    """One load on one placement; a layer without load is even."""

    mean_over_max: float
    """Mean over layers of each layer's mean over its fullest shard; 1 is even, as SGLang's balancedness."""
    means_over_maxes: float
    """Sum of the layers' means over the sum of their maxima, as vLLM's balancedness."""
    excess: float
    """Mean over layers of (max - mean) / mean; 0 is even."""

    @property
    def slowness(self) -> float:
        """How much longer all layers take than if shards were even: 1 or more."""
        return 1 / self.means_over_maxes


def shard_loads(load: np.ndarray, homes: Homes, shards_count: int) -> np.ndarray:
    """`[layers, shards]` of `load [layers, experts]`, an expert's shared evenly by its replicas."""
    loads = np.zeros((len(load), shards_count))
    for layer, of_layer in enumerate(homes):
        counts = np.fromiter(map(len, of_layer), np.int64, len(of_layer))
        shards = np.fromiter((shard for home in of_layer for shard in home), np.int64, counts.sum())
        np.add.at(loads[layer], shards, np.repeat(load[layer] / counts, counts))
    return loads


def balance_of(loads: np.ndarray) -> Balance:
    """The balance of `loads [layers, shards]`."""
    busy = loads[loads.sum(axis=1) > 0]
    if not len(busy):
        return Balance(1.0, 1.0, 0.0)
    means, maxima = busy.mean(axis=1), busy.max(axis=1)
    return Balance(
        float((means / maxima).mean()),
        float(means.sum() / maxima.sum()),
        float((maxima / means - 1).mean()),
    )
