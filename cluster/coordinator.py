"""The one actor that knows everybody; it holds nothing that members would not tell it again."""

import time
from pathlib import Path

from cluster.membership import Member, Membership, View, without_load
from kernels.model.config import ModelConfig


class Coordinator:
    """Heartbeats in, views out; if it dies, the next heartbeats rebuild it."""

    def __init__(self, model_folder: Path, shards_expected_count: int):
        self._membership = Membership(ModelConfig.from_folder(model_folder), shards_expected_count)

    async def heartbeat(self, member: Member) -> View:
        """Take a member's word and tell it what everybody has said."""
        return self._membership.heartbeat(without_load(member), time.monotonic())

    async def leave(self, name: str) -> None:
        """A member has ended in good order."""
        self._membership.leave(name)

    async def view(self) -> View:
        """What the coordinator knows."""
        return self._membership.view(time.monotonic())
