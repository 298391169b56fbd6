"""What KubeRay 1.7 takes: its field names, and what its operator refuses or quietly does otherwise.

The names are those of the RayService's definition in that release, the rules those of its operator.
"""

import re
from typing import Any

from tests.helm.rendering import Manifest

NAME_LENGTH_MAX = 47
TOKEN_SINCE = (2, 52)
NAMES_OF_KUBERAY = ("app.kubernetes.io/name", "app.kubernetes.io/created-by", "ray.io/identifier")

CORE = object()
"""A Kubernetes object of its own, checked by its own schema."""
TEXT, NUMBER, YES_NO, TABLE, ITEMS = str, int, bool, dict, list

GROUP = {"labels": TABLE, "rayStartParams": TABLE, "resources": TABLE, "template": CORE}
FIELDS = {
    "excludeHeadPodFromServeSvc": YES_NO,
    "managedBy": TEXT,
    "rayClusterDeletionDelaySeconds": NUMBER,
    "serveConfigV2": TEXT,
    "serveService": CORE,
    "suspend": YES_NO,
    "upgradeStrategy": {
        "type": {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"},
        "clusterUpgradeOptions": TABLE,
    },
    "rayClusterConfig": {
        "authOptions": {"enableK8sTokenAuth": YES_NO, "mode": {"disabled", "token"}, "secretName": TEXT},
        "autoscalerOptions": {
            "args": ITEMS,
            "command": ITEMS,
            "env": ITEMS,
            "envFrom": ITEMS,
            "idleTimeoutSeconds": NUMBER,
            "image": TEXT,
            "imagePullPolicy": TEXT,
            "resources": TABLE,
            "securityContext": TABLE,
            "upscalingMode": {"Default", "Aggressive", "Conservative"},
            "version": {"v1", "v2"},
            "volumeMounts": ITEMS,
        },
        "enableInTreeAutoscaling": YES_NO,
        "headServiceAnnotations": TABLE,
        "managedBy": TEXT,
        "rayVersion": TEXT,
        "suspend": YES_NO,
        "headGroupSpec": GROUP
        | {"enableIngress": YES_NO, "headService": CORE, "ingressOptions": TABLE, "serviceType": TEXT},
        "workerGroupSpecs": [
            GROUP
            | {
                "groupName": TEXT,
                "idleTimeoutSeconds": NUMBER,
                "maxReplicas": NUMBER,
                "minReplicas": NUMBER,
                "numOfHosts": NUMBER,
                "priority": NUMBER,
                "replicas": NUMBER,
                "scaleStrategy": TABLE,
                "suspend": YES_NO,
            }
        ],
    },
}
"""Features behind gates that are off by default (mTLS, policies, RocksDB, history) are left out."""


def misfits(value: Any, shape: Any = None, path: str = "spec") -> list[str]:
    """Where a RayService's spec has a field that KubeRay does not know, or one of another type."""
    shape = FIELDS if shape is None else shape
    if shape is CORE:
        return []
    if isinstance(shape, set):
        return [] if value in shape else [f"{path}: {value!r} is none of {sorted(shape)}"]
    if isinstance(shape, type):
        return [] if type(value) is shape else [f"{path}: {value!r} is no {shape.__name__}"]
    if isinstance(shape, list):
        return [
            breach for one, item in enumerate(value) for breach in misfits(item, shape[0], f"{path}[{one}]")
        ]
    unknown = [f"{path}.{key}: KubeRay has no such field" for key in value if key not in shape]
    known = ((key, inner) for key, inner in value.items() if key in shape)
    return unknown + [
        breach for key, inner in known for breach in misfits(inner, shape[key], f"{path}.{key}")
    ]


def refusals(service: Manifest) -> list[str]:
    """What KubeRay's operator would refuse in a RayService, or read otherwise than it looks."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = {"headgroup": cluster["headGroupSpec"]} | {
        group["groupName"]: group for group in cluster["workerGroupSpecs"]
    }
    found = [breach for name, group in groups.items() for breach in _of_group(name, group)]
    name = service["metadata"]["name"]
    if len(name) > NAME_LENGTH_MAX or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"the name {name} is no DNS label of at most {NAME_LENGTH_MAX} characters")
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split(".")[:2])
    if cluster.get("authOptions", {}).get("mode") == "token" and version < TOKEN_SINCE:
        found.append("a token needs rayVersion 2.52 or newer")
    if not cluster.get("enableInTreeAutoscaling") and "autoscalerOptions" in cluster:
        found.append("autoscalerOptions without the autoscaler")
    head_ports = cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("ports", [])
    has_serve_port = any(port["name"] == "serve" or port["name"].startswith("serve-") for port in head_ports)
    if not has_serve_port and "serveService" not in service["spec"]:
        found.append("neither a serveService nor a port named serve: the operator would stop there")
    return found + [breach for group in cluster["workerGroupSpecs"] for breach in _of_sizes(group)]


def _of_group(name: str, group: Manifest) -> list[str]:
    start, pod = group.get("rayStartParams", {}), group["template"]
    found = []
    if group.get("resources") and start.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        found.append(f"{name}: resources stand in rayStartParams and in resources")
    if "labels" in start:
        found.append(f"{name}: labels stand in rayStartParams")
    texts = [*start.values(), *group.get("resources", {}).values()]
    found += [f"{name}: {text!r} is no text" for text in texts if not isinstance(text, str)]
    if pod["spec"].get("restartPolicy", "Never") != "Never":
        found.append(f"{name}: the autoscaler bears only restartPolicy Never, or none")
    if not pod["spec"]["containers"][0]["name"].startswith("ray-"):
        found.append(f"{name}: Ray's container is not the first")
    if "readinessProbe" not in pod["spec"]["containers"][0]:
        found.append(f"{name}: without a readinessProbe the operator asks for Serve's proxy, which is off")
    overridden = [label for label in NAMES_OF_KUBERAY if label in pod["metadata"].get("labels", {})]
    return found + [f"{name}: {label} is what KubeRay's head service selects by" for label in overridden]


def _of_sizes(group: Manifest) -> list[str]:
    least, most, now = group["minReplicas"], group["maxReplicas"], group["replicas"]
    return (
        [] if 0 <= least <= now <= most else [f"{group['groupName']}: {now} is not within {least} and {most}"]
    )
