"""The arithmetic of the examples for GPUs, by the product's own: what is written there has room."""

import pytest
from transformers import DeepseekV3Config

from cluster.config import ClusterConfig, load_config
from cluster.place import kept_expert_bytes, plan_config
from experts.plan import Planner
from kernels.model.config import ModelConfig
from tests.helm.rendering import CHART, EXAMPLES, config_text

GPU_BYTES = 141e9
ATTENTION_HALF_COUNT = 17.1e9
GPU_EXAMPLES = ("8xh200", "deepseek-v3-18-nodes")


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    """DeepSeek-V3."""
    return ModelConfig.from_huggingface(DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]).to_dict())


def config_of(releases, example, folder) -> ClusterConfig:
    """What the pods of an example would read."""
    (folder / "cluster.yaml").write_text(config_text(releases[example]))
    return load_config(folder / "cluster.yaml")


@pytest.mark.parametrize("example", GPU_EXAMPLES)
def test_examples_for_gpus_say_first_that_they_were_tried_on_none(example):
    first = EXAMPLES[example].read_text().splitlines()[0]
    assert first.startswith("# For GPUs, and tried on none yet:")
    assert EXAMPLES[example].name not in (CHART / "README.md").read_text().split("| example |")[0]


@pytest.mark.parametrize("example", GPU_EXAMPLES)
def test_nodes_have_room_for_weights_and_latents(releases, example, tmp_path):
    config = config_of(releases, example, tmp_path)
    for section in (config.prefill, config.decode):
        assert section.latents_bytes + 2 * ATTENTION_HALF_COUNT < 0.9 * GPU_BYTES


def test_even_the_fewest_shards_have_room_for_all_replicas(releases, model, tmp_path):
    config = config_of(releases, "deepseek-v3-18-nodes", tmp_path)
    experts, planner = config.experts, Planner.of_model(model, plan_config(model, config))
    replicas_count = 2 * model.routed_experts_count + 64
    for shards_count in (experts.shards_min, experts.shards_count, experts.shards_max):
        assert planner.slots_count(shards_count) * shards_count >= replicas_count
    assert planner.slots_count(experts.shards_count) == 9
    slots_max = planner.config.slots_max
    assert slots_max * 43 >= 2 * model.routed_experts_count > slots_max * 42
    held_bytes = slots_max * len(model.moe_layers) * kept_expert_bytes(model, config)
    assert held_bytes + experts.rebalance_step_bytes < 0.9 * GPU_BYTES


def test_one_host_holds_the_experts_in_fp8_alone(releases, model, tmp_path):
    config = config_of(releases, "8xh200", tmp_path)
    slots_count = Planner.of_model(model, plan_config(model, config)).slots_count(config.experts.shards_min)
    bfloat16_bytes = slots_count * len(model.moe_layers) * kept_expert_bytes(model, config)
    assert bfloat16_bytes > GPU_BYTES > bfloat16_bytes / 2
