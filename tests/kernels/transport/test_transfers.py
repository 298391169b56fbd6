"""Transfers over a link that cannot be ended."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from kernels.transport.transfers import Transfers


@pytest.mark.parametrize("ends", [True, False])
def test_memory_outlives_its_channel_where_a_gpu_may_still_use_it(monkeypatch, ends):
    monkeypatch.setattr(Transfers, "_kept", [])
    transfers = Transfers(SimpleNamespace(abort=lambda: ends))
    transfers.receive([torch.zeros(4, dtype=torch.uint8)], [4], "a mark")
    assert transfers.abort() == ends
    assert transfers.moving != ends
    known = weakref.ref(transfers)
    del transfers
    gc.collect()
    assert (known() is None) == ends
