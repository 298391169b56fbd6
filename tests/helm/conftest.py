"""Each example rendered once."""

import copy

import pytest

from tests.helm.rendering import EXAMPLES, Manifest, render


@pytest.fixture(scope="session")
def releases() -> dict[str, list[Manifest]]:
    """Manifests of every example by its name; not to be changed."""
    return {example: render(example) for example in EXAMPLES}


@pytest.fixture
def release(releases) -> list[Manifest]:
    """A copy of the example with everything switched on that can be, to plant breaches in."""
    return copy.deepcopy(releases["local-kind"])
