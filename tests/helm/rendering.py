"""The chart as the real helm renders it, and the parts of it that tests look at."""

import subprocess
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm"
EXAMPLES = {
    "defaults": None,
    "local-kind": CHART / "examples/values-local-kind.yaml",
    "8xh200": CHART / "examples/values-8xh200.yaml",
    "deepseek-v3-18-nodes": CHART / "examples/values-deepseek-v3-18-nodes.yaml",
}
HELM = next(
    Path(file.locate()).resolve() for file in distribution("helm-binary").files or [] if file.name == "helm"
)
TIMEOUT_S = 30
POOLS = ("gateway", "prefill", "decode", "experts")

Manifest = dict[str, Any]


def helm(*arguments: str | Path, example: str = "defaults") -> subprocess.CompletedProcess[str]:
    """Run helm on the chart with an example's values; its exit code is left to the caller."""
    values = ["--values", str(EXAMPLES[example])] if EXAMPLES[example] else []
    command = [str(HELM), *map(str, arguments), *values]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def render(example: str = "defaults", *options: str, release: str = "demo") -> list[Manifest]:
    """Every manifest of a release; raises RuntimeError with helm's message."""
    done = helm("template", release, CHART, "--namespace", "models", *options, example=example)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """All manifests of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def ray_service(manifests: list[Manifest]) -> Manifest:
    """The one RayService."""
    [service] = of_kind(manifests, "RayService")
    return service


def ray_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates of the RayService by group, the head first."""
    cluster = ray_service(manifests)["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]} | groups


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Everything that becomes a pod, by name: templates of the RayService, and pods themselves."""
    alone = {pod["metadata"]["name"]: pod for pod in of_kind(manifests, "Pod")}
    return ray_templates(manifests) | alone


def containers(pod: Manifest) -> list[Manifest]:
    """All containers of a pod, those that run first included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def config_text(manifests: list[Manifest]) -> str:
    """The file that every Ray pod reads."""
    [text] = [
        manifest["data"]["cluster.yaml"]
        for manifest in of_kind(manifests, "ConfigMap")
        if "cluster.yaml" in manifest["data"]
    ]
    return text


def serve_config(manifests: list[Manifest]) -> dict[str, Any]:
    """What KubeRay hands to Ray Serve."""
    return yaml.safe_load(ray_service(manifests)["spec"]["serveConfigV2"])
