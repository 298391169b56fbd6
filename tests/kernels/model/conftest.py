"""The tiny checkpoint of these tests."""

from tests.fixtures import checkpoint_folder

__all__ = ["checkpoint_folder"]
