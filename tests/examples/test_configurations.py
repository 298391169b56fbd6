"""Every configuration among the examples is one."""

from pathlib import Path

import pytest

from cluster.config import load_config


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_a_configuration(path: Path):
    config = load_config(path)
    assert (config.model.folder / "config.json").exists()


def test_without_pools_every_decode_node_reads_prompts():
    config = load_config(Path("examples/colocated.yaml"))
    assert (config.prefill.count, config.decode.reads_prompts) == (0, True)
