"""The tiny model and the nodes of these tests."""

from tests.fixtures import checkpoint_folder, make_stage, stage, transformer

__all__ = ["checkpoint_folder", "make_stage", "stage", "transformer"]
