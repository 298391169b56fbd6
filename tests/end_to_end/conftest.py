"""Real Ray, real gRPC: one Ray cluster for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import pools
from tests.checkpoints import build
from tests.end_to_end.stage import Stage


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """Where clusters are put."""
    made = Stage()
    yield made
    made.clear()
    pools.stop()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Builds tiny checkpoints by name, each once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder_of(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else build(name, folder)

    return folder_of
