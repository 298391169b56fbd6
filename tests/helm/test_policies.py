"""The policies hold for every example, and a breach planted on purpose is reported."""

import pytest

from tests.helm.policies import (
    POLICIES,
    blind_selector,
    foreign_to_kuberay,
    open_port,
    plain_secret,
    privilege,
    ray_without_token,
    root,
    served_by_proxy,
    short_grace,
    unbounded_container,
    unguarded_pool,
    untagged_image,
    writable_root,
    wrong_name,
)
from tests.helm.rendering import EXAMPLES, of_kind, ray_service, ray_templates, render


def cluster(release):
    """The RayCluster inside."""
    return ray_service(release)["spec"]["rayClusterConfig"]


def decode(release):
    """The first container of a decode pod."""
    return ray_templates(release)["decode"]["spec"]["containers"][0]


def pod(release):
    """A decode pod."""
    return ray_templates(release)["decode"]["spec"]


def policy(release, name):
    """One NetworkPolicy's spec."""
    return next(
        one["spec"] for one in of_kind(release, "NetworkPolicy") if one["metadata"]["name"].endswith(name)
    )


def without(release, kind):
    """All manifests go that are of a kind."""
    release[:] = [one for one in release if one["kind"] != kind]


def with_serve_config(release, old, new):
    """Another text in what KubeRay hands to Serve."""
    spec = ray_service(release)["spec"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)


PLANTED = [
    (ray_without_token, lambda one: cluster(one)["authOptions"].update(mode="disabled")),
    (ray_without_token, lambda one: cluster(one).pop("authOptions")),
    (root, lambda one: pod(one)["securityContext"].update(runAsNonRoot=False)),
    (root, lambda one: decode(one)["securityContext"].update(runAsUser=0)),
    (root, lambda one: pod(one)["initContainers"][0]["securityContext"].pop("runAsNonRoot")),
    (writable_root, lambda one: decode(one)["securityContext"].pop("readOnlyRootFilesystem")),
    (writable_root, lambda one: cluster(one)["autoscalerOptions"].pop("securityContext")),
    (privilege, lambda one: decode(one)["securityContext"].update(privileged=True)),
    (
        privilege,
        lambda one: decode(one)["securityContext"].update(capabilities={"drop": ["ALL"], "add": ["X"]}),
    ),
    (privilege, lambda one: pod(one).update(hostNetwork=True)),
    (privilege, lambda one: pod(one)["securityContext"].pop("seccompProfile")),
    (privilege, lambda one: pod(one).pop("automountServiceAccountToken")),
    (
        privilege,
        lambda one: ray_templates(one)["decode"]["metadata"]["annotations"].update(
            {"container.apparmor.security.beta.kubernetes.io/ray-worker": "unconfined"}
        ),
    ),
    (open_port, lambda one: without(one, "NetworkPolicy")),
    (
        open_port,
        lambda one: ray_templates(one)["decode"]["metadata"]["labels"].pop("app.kubernetes.io/part-of"),
    ),
    (open_port, lambda one: policy(one, "clients")["ingress"][0].pop("from")),
    (
        open_port,
        lambda one: policy(one, "clients")["ingress"][0].update({"from": [{"namespaceSelector": {}}]}),
    ),
    (
        open_port,
        lambda one: policy(one, "within")["egress"].append({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
    ),
    (
        open_port,
        lambda one: policy(one, "operator")["ingress"][0]["from"][0].update(namespaceSelector={}),
    ),
    (open_port, lambda one: of_kind(one, "Service")[0]["spec"].update(type="LoadBalancer")),
    (unbounded_container, lambda one: decode(one).pop("resources")),
    (unbounded_container, lambda one: decode(one)["resources"]["limits"].update(memory="1Mi")),
    (unbounded_container, lambda one: pod(one)["volumes"].append({"name": "more", "emptyDir": {}})),
    (untagged_image, lambda one: decode(one).update(image="registry:5000/trivium")),
    (untagged_image, lambda one: decode(one).update(image="trivium:latest")),
    (plain_secret, lambda one: decode(one)["env"].append({"name": "RAY_AUTH_TOKEN", "value": "open sesame"})),
    (
        plain_secret,
        lambda one: of_kind(one, "ConfigMap")[0]["data"].update(
            more=next(iter(of_kind(one, "Secret")[0]["data"].values()))
        ),
    ),
    (short_grace, lambda one: pod(one).update(terminationGracePeriodSeconds=600)),
    (short_grace, lambda one: pod(one).pop("terminationGracePeriodSeconds")),
    (short_grace, lambda one: decode(one).pop("lifecycle")),
    (unguarded_pool, lambda one: one.remove(of_kind(one, "PodDisruptionBudget")[0])),
    (unguarded_pool, lambda one: of_kind(one, "PodDisruptionBudget")[0]["spec"].update(minAvailable="50%")),
    (unguarded_pool, lambda one: of_kind(one, "PodDisruptionBudget")[0]["spec"].update(minAvailable=0)),
    (wrong_name, lambda one: of_kind(one, "Service")[0]["metadata"].update(name="a" * 64)),
    (wrong_name, lambda one: of_kind(one, "Service")[0]["metadata"]["labels"].update(odd="two words")),
    (wrong_name, lambda one: one.append(of_kind(one, "Service")[0])),
    (blind_selector, lambda one: of_kind(one, "Service")[0]["spec"]["selector"].update(more="x")),
    (blind_selector, lambda one: of_kind(one, "Service")[0]["spec"]["ports"][0].update(targetPort="http")),
    (served_by_proxy, lambda one: with_serve_config(one, "Disabled", "HeadOnly")),
    (served_by_proxy, lambda one: with_serve_config(one, "route_prefix: null", "route_prefix: /")),
    (served_by_proxy, lambda one: with_serve_config(one, "enabled: true", "enabled: false")),
    (foreign_to_kuberay, lambda one: cluster(one).update(rayversion="2.60.0")),
    (foreign_to_kuberay, lambda one: cluster(one)["workerGroupSpecs"][0].update(replicas="1")),
    (foreign_to_kuberay, lambda one: cluster(one)["authOptions"].update(mode="none")),
    (foreign_to_kuberay, lambda one: cluster(one).update(rayVersion="2.51.0")),
    (
        foreign_to_kuberay,
        lambda one: cluster(one).update(enableInTreeAutoscaling=False),
    ),
    (
        foreign_to_kuberay,
        lambda one: cluster(one)["headGroupSpec"]["rayStartParams"].update({"num-cpus": "0"}),
    ),
    (foreign_to_kuberay, lambda one: cluster(one)["headGroupSpec"]["rayStartParams"].update(labels="a=b")),
    (foreign_to_kuberay, lambda one: cluster(one)["headGroupSpec"]["resources"].update(CPU=0)),
    (foreign_to_kuberay, lambda one: cluster(one)["workerGroupSpecs"][0].update(minReplicas=9)),
    (foreign_to_kuberay, lambda one: pod(one).update(restartPolicy="Always")),
    (foreign_to_kuberay, lambda one: pod(one)["containers"].insert(0, {"name": "beside"})),
    (foreign_to_kuberay, lambda one: decode(one).pop("readinessProbe")),
    (foreign_to_kuberay, lambda one: ray_service(one)["spec"].pop("serveService")),
    (foreign_to_kuberay, lambda one: ray_service(one)["metadata"].update(name="a" * 48)),
    (
        foreign_to_kuberay,
        lambda one: ray_templates(one)["head"]["metadata"]["labels"].update(
            {"app.kubernetes.io/name": "trivium"}
        ),
    ),
]


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("rule", POLICIES, ids=lambda rule: rule.__name__)
def test_a_policy_holds(rule, example, releases):
    assert rule(releases[example]) == []


@pytest.mark.parametrize(("rule", "plant"), PLANTED)
def test_a_planted_breach_is_reported(rule, plant, release):
    plant(release)
    assert rule(release)


def test_every_policy_was_broken_once():
    assert {rule for rule, _ in PLANTED} == set(POLICIES)


def test_kubernetes_api_is_reached_by_the_autoscaler_alone(releases):
    asking = [name for name in EXAMPLES if cluster(releases[name])["enableInTreeAutoscaling"]]
    assert asking == ["local-kind"]
    for name, release in releases.items():
        policies = [one["metadata"]["name"] for one in of_kind(release, "NetworkPolicy")]
        assert ("demo-trivium-kubernetes-api" in policies) == (name in asking)
        for template in ray_templates(release).values():
            mounts = [mount["name"] for mount in template["spec"]["containers"][0]["volumeMounts"]]
            assert "kubernetes-api" not in mounts


def test_what_people_open_on_purpose_is_open():
    opened = render("defaults", "--set", "service.type=LoadBalancer", "--set", "networkPolicy.enabled=false")
    assert len(open_port(opened)) == 1 + 2 * len([*ray_templates(opened), "test"])
