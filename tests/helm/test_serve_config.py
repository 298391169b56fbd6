"""What the chart hands to Ray Serve, as Serve itself and the product read it."""

import hashlib

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.pools import APPLICATION, DRAIN_S, configured
from tests.helm.rendering import CHART, EXAMPLES, config_text, ray_templates, serve_config


@pytest.mark.parametrize("example", EXAMPLES)
def test_serve_takes_its_configuration(releases, example):
    parsed = ServeDeploySchema.model_validate(serve_config(releases[example]))
    [application] = parsed.applications
    assert application.name == APPLICATION
    assert application.import_path == f"{configured.__module__}:{configured.__name__}"
    revision = hashlib.sha256(config_text(releases[example]).encode()).hexdigest()
    assert application.args == {"config": "/etc/trivium/cluster.yaml", "revision": revision}


def test_pods_live_as_long_as_the_product_drains(releases):
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["drain"]["finishSeconds"] >= DRAIN_S
    for template in ray_templates(releases["defaults"]).values():
        assert template["spec"]["terminationGracePeriodSeconds"] > DRAIN_S
