"""Experts behind a stage answer as they do without one."""

import torch

from experts.staged import StagedExperts


def test_a_staged_dispatch_is_the_dispatch(local, device):
    hidden = torch.randn(5, 128)
    ids, weights = torch.randint(0, 16, (5, 4)), torch.rand(5, 4)
    pending = StagedExperts(local).dispatch(1, hidden.to(device), ids.to(device), weights.to(device))
    mixed = pending.combine()
    assert mixed.device.type == device.type
    assert torch.equal(mixed.cpu(), local.dispatch(1, hidden, ids, weights).combine())
