"""A recorder without a GPU: notes every operation of torch and every kernel, and does them again in place.

As with a CUDA graph, what was a number on the host while it recorded stays as it was, and every tensor stays
where it was: a lane whose result depends on either comes out wrong when it is played for other requests.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from decode.graphs import Replay

Deed = Callable[[], None]


class Noting(TorchDispatchMode):
    """Does operations and keeps how to do them again."""

    def __init__(self):
        super().__init__()
        self.deeds: list[Deed] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Do one, and note it."""
        kwargs = kwargs or {}
        results = operation(*args, **kwargs)

        def again() -> None:
            olds = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
            news = [
                leaf for leaf in tree_leaves(operation(*args, **kwargs)) if isinstance(leaf, torch.Tensor)
            ]
            for old, new in zip(olds, news, strict=True):
                if old.data_ptr() != new.data_ptr() and not old.is_mkldnn:
                    old.copy_(new)

        self.deeds.append(again)
        return results


class ReplayingRecorder:
    """Computes while it records, which harms nobody, and again when it is played."""

    def begin(self) -> None:
        """Note from now on."""
        self._mode = Noting()
        self._launch = InterpretedFunction.run
        launch, deeds = self._launch, self._mode.deeds

        def run(kernel, *args, grid, warmup, **options):
            deeds_before = len(deeds)
            result = launch(kernel, *args, grid=grid, warmup=warmup, **options)
            del deeds[deeds_before:]  # what the interpreter itself did with torch
            deeds.append(lambda: launch(kernel, *args, grid=grid, warmup=warmup, **options))
            return result

        InterpretedFunction.run = run
        self._mode.__enter__()

    def end(self) -> Replay:
        """Stop noting."""
        self._mode.__exit__(None, None, None)
        InterpretedFunction.run = self._launch
        deeds = self._mode.deeds

        def replay() -> None:
            for deed in deeds:
                deed()

        return replay

    def abandon(self) -> None:
        """Stop noting."""
        self.end()
