"""The real helm, Kubernetes' own schemas, and the configuration that the chart writes."""

import json
import math
import re
import shutil

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import SchemaNotFoundError

from cluster.config import ClusterConfig, load_config
from cluster.tls import SHOWN_NAME, TRUSTED_FILE
from tests.helm.rendering import (
    CHART,
    EXAMPLES,
    POOLS,
    ROOT,
    config_text,
    helm,
    of_kind,
    ray_service,
    ray_templates,
    render,
    serve_config,
)

KUBERNETES = "1.31"
FOREIGN_KINDS = {"RayService", "PodMonitor", "ServiceMonitor", "PrometheusRule"}
FILLED = {
    "model": {"folder"},
    "gateway": {"host", "token_file", "tls_certificate_file", "tls_key_file", "resources"},
    "prefill": {"resources"},
    "decode": {"resources"},
    "experts": {"resources"},
    "transport": {"scheme", "host", "secret_file"},
    "operations": {"enabled", "host", "token_file", "coordinator_resources"},
    "dashboard": {"enabled", "port"},
}
"""What the chart decides, so that its values do not take it."""

each_example = pytest.mark.parametrize("example", EXAMPLES)


def checked_config(manifests, folder) -> ClusterConfig:
    """The configuration that pods will read, through the product's own check."""
    (folder / "cluster.yaml").write_text(config_text(manifests))
    return load_config(folder / "cluster.yaml")


def groups(manifests) -> dict:
    """Worker groups of the RayService by name."""
    cluster = ray_service(manifests)["spec"]["rayClusterConfig"]
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


@each_example
def test_helm_lints_it(example):
    done = helm("lint", "--strict", CHART, example=example)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout and "ERROR" not in done.stdout


@each_example
def test_kubernetes_takes_every_manifest(releases, example):
    unknown = set()
    for manifest in releases[example]:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except SchemaNotFoundError:
            unknown.add(manifest["kind"])
    assert unknown <= FOREIGN_KINDS


@each_example
def test_kubernetes_takes_the_pods_inside_the_rayservice(releases, example):
    for name, template in ray_templates(releases[example]).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | template["metadata"]}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "inner"}}
    service |= ray_service(releases[example])["spec"]["serveService"]
    kubernetes_validate.validate(service, KUBERNETES, strict=True)


def test_a_manifest_with_a_misspelt_field_is_not_taken(releases):
    [policy, *_] = of_kind(releases["defaults"], "NetworkPolicy")
    wrong = policy | {"spec": policy["spec"] | {"policytypes": ["Ingress"]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@each_example
def test_the_configuration_parses(releases, example, tmp_path):
    config = checked_config(releases[example], tmp_path)
    assert config.transport.scheme == "tcp"
    assert config.gateway.token_file and config.operations.token_file and config.transport.secret_file
    assert not config.dashboard.enabled
    values = yaml.safe_load(EXAMPLES[example].read_text()) if EXAMPLES[example] else {}
    said = yaml.safe_load(config_text(releases[example]))
    for section, keys in values.get("config", {}).items():
        assert keys == said[section] if not isinstance(keys, dict) else keys.items() <= said[section].items()


@each_example
def test_pods_have_room_for_the_actors_that_the_configuration_asks_for(releases, example, tmp_path):
    config = checked_config(releases[example], tmp_path)
    counts = {name: getattr(config, name).count for name in ("gateway", "prefill", "decode")}
    counts["experts"] = config.experts.shards_count
    for name in POOLS:
        group, resources = groups(releases[example])[name], getattr(config, name).resources
        per_pod = int(group["resources"][f"trivium_{name}"])
        assert resources[f"trivium_{name}"] == 1
        assert group["replicas"] == math.ceil(counts[name] / per_pod)
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits.get("nvidia.com/gpu", 0)) == per_pod * resources.get("GPU", 0)
    head = ray_service(releases[example])["spec"]["rayClusterConfig"]["headGroupSpec"]
    asked = config.operations.coordinator_resources
    assert head["resources"] == {"CPU": "0"} | {name: str(int(amount)) for name, amount in asked.items()}


@each_example
def test_files_that_the_configuration_names_are_mounted(releases, example, tmp_path):
    config = checked_config(releases[example], tmp_path)
    named = {config.transport.secret_file, config.gateway.token_file, config.operations.token_file}
    for template in ray_templates(releases[example]).values():
        mounts = {mount["name"]: mount for mount in template["spec"]["containers"][0]["volumeMounts"]}
        [settings] = [one for one in template["spec"]["volumes"] if one["name"] == "settings"]
        paths = {
            f"{mounts['settings']['mountPath']}/{item['path']}"
            for source in settings["projected"]["sources"]
            for item in source.get("secret", {}).get("items", [])
        }
        assert paths == {str(path) for path in named}
        assert str(config.model.folder).startswith(mounts["models"]["mountPath"])
        assert mounts["models"]["readOnly"] and mounts["settings"]["readOnly"]


@each_example
def test_ports_of_the_configuration_are_those_of_pods_and_services(releases, example, tmp_path):
    config = checked_config(releases[example], tmp_path)
    templates = ray_templates(releases[example])
    ports = {
        name: {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        for name, template in templates.items()
    }
    assert ports["gateway"]["grpc"] == config.gateway.port
    assert ports["gateway"]["gateway-metrics"] == config.gateway.metrics_port
    assert ports["head"]["operations"] == config.operations.port
    gateway = templates["gateway"]["spec"]["containers"][0]
    probe = gateway["readinessProbe"]
    probed = probe["grpc"]["port"] if "grpc" in probe else probe["httpGet"]["port"]
    assert probed in (config.gateway.port, config.gateway.metrics_port)
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(releases[example], "Service")}
    assert services["demo-trivium-gateway"]["ports"][0]["port"] == config.gateway.port
    assert services["demo-trivium-operations"]["ports"][0]["port"] == config.operations.port


def test_values_take_each_key_of_the_configuration_that_the_chart_does_not_fill():
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]["properties"]
    wanted = {}
    for name, field in ClusterConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys = set(inner) - FILLED.get(name, set()) if inner else None
        if keys or inner is None:
            wanted[name] = keys
    assert {
        name: set(one["properties"]) if "properties" in one else None for name, one in schema.items()
    } == wanted


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("config.prefil.count=2", "Additional property prefil is not allowed"),
        ("config.decode.cuont=2", "Additional property cuont is not allowed"),
        ("config.decode.count=many", "config.decode.count: Invalid type. Expected: integer, given: string"),
        ("config.decode.latents_bytes=lots", "config.decode.latents_bytes: Does not match pattern"),
        ("config.model.folder=/elsewhere", "Additional property folder is not allowed"),
        ("config.transport.scheme=unix", "config.transport: Additional property scheme is not allowed"),
        ("pools.decode.nodeselector.a=b", "Additional property nodeselector is not allowed"),
        ("pools.decode.runtimeClassName=Nvidia", "pools.decode.runtimeClassName: Does not match pattern"),
        ("pools.decode.annotations.a=1", "pools.decode.annotations.a: Invalid type"),
        ("pools.gateway.actorsPerPod=2", "pools.gateway.actorsPerPod does not match: 1"),
        ("ray.upgrade=NewClusterWithIncrementalUpgrade", "ray.upgrade must be one of the following"),
        ("drain.finishSeconds=60", "drain.finishSeconds: Must be greater than or equal to 600"),
        ("security.userId=0", "security.userId: Must be greater than or equal to 1"),
        ("image.tag=latest", "image.tag: Must not validate the schema (not)"),
        ("model.hostPath=/data", "set exactly one of persistentVolumeClaim and hostPath"),
        ("model.persistentVolumeClaim=", "set exactly one of persistentVolumeClaim and hostPath"),
        ("pools.experts.replicas=1", "1 pods of 1 actors hold fewer than the 2 that config asks for"),
        ("pools.decode.minReplicas=3", "replicas 1 is not between minReplicas 3 and maxReplicas 4"),
        ("secrets.make=false", "secrets.channel: names no Secret, and secrets.make is false"),
        ("config.gateway.port=80", "config.gateway.port: Must be greater than or equal to 1024"),
        ("config.gateway.port=8080", "config.gateway.port: 8080 is the port of Ray's metrics"),
        (
            "config.gateway.metrics_port=52365",
            "config.gateway.metrics_port: 52365 is the port of Ray's agent",
        ),
        ("config.operations.port=8265", "config.operations.port: 8265 is the port of Ray's dashboard"),
        ("config.operations.port=50051", "config.operations.port: 50051 is the port of config.gateway.port"),
    ],
)
def test_helm_refuses_values_with_the_reason(setting, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        render("defaults", "--set", setting)


def test_a_changed_configuration_is_another_revision_and_the_same_pods(releases):
    changed = render("defaults", "--set", "config.decode.requests_max=7")
    before, after = releases["defaults"], changed
    assert serve_config(before)["applications"][0]["args"] != serve_config(after)["applications"][0]["args"]
    assert ray_templates(before) == ray_templates(after)


def changed_templates(before, *settings: str) -> set[str]:
    """Groups whose pods are others after an upgrade; KubeRay compares no more of a group than that."""
    options = [part for setting in settings for part in ("--set", setting)]
    after = ray_templates(render("defaults", *options))
    return {name for name, template in ray_templates(before).items() if template != after[name]}


def test_a_changed_count_of_pods_changes_the_pods_of_that_pool(releases):
    before = releases["defaults"]
    assert changed_templates(before, "config.decode.count=3") == {"decode"}
    assert changed_templates(before, "config.experts.shards_max=6") == set(), "a bound is for actors alone"
    assert changed_templates(before, "pools.prefill.replicas=2") == {"prefill"}


def test_where_pods_follow_actors_only_their_bounds_change_pods():
    following = "ray.podsFollowActors=true"
    before = render("defaults", "--set", following)
    assert changed_templates(before, following, "config.decode.count=3") == set()
    assert changed_templates(before, following, "config.decode.count_max=6") == {"decode"}


@pytest.mark.parametrize(
    ("settings", "delay_s"),
    [
        ([], 120),
        (["ray.oldClusterSeconds=900"], 900),
        (["drain.replacementSeconds=300"], 300),
        (["ray.oldClusterSeconds=0"], 120),
    ],
)
def test_an_old_cluster_stays_for_as_long_as_clients_need_to_leave_it(settings, delay_s):
    options = [part for setting in settings for part in ("--set", setting)]
    spec = ray_service(render("defaults", *options))["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] == delay_s


def test_pods_take_a_runtime_and_annotations_of_their_own():
    settings = (
        "pools.decode.runtimeClassName=nvidia",
        "pools.decode.annotations.example\\.org/paid-by=them",
        "head.annotations.example\\.org/paid-by=us",
    )
    templates = ray_templates(render("defaults", *(part for one in settings for part in ("--set", one))))
    runtimes = {name: template["spec"].get("runtimeClassName") for name, template in templates.items()}
    assert {name for name, runtime in runtimes.items() if runtime} == {"decode"}
    assert runtimes["decode"] == "nvidia"
    annotations = {name: template["metadata"].get("annotations", {}) for name, template in templates.items()}
    payers = {name: one.pop("example.org/paid-by", None) for name, one in annotations.items()}
    assert payers["decode"] == "them" and payers["head"] == "us" and payers["prefill"] is None
    assert annotations["decode"].keys() == annotations["prefill"].keys() == {"trivium/pods"}


def test_existing_secrets_are_used_and_none_is_made():
    names = {"rayToken": "a", "channel": "b", "gatewayToken": "c", "operationsToken": "d"}
    options = [part for key, name in names.items() for part in ("--set", f"secrets.{key}={name}")]
    release = render("defaults", "--set", "secrets.make=false", *options)
    assert of_kind(release, "Secret") == []
    assert ray_service(release)["spec"]["rayClusterConfig"]["authOptions"]["secretName"] == "a"
    [settings] = [
        one for one in ray_templates(release)["decode"]["spec"]["volumes"] if one["name"] == "settings"
    ]
    used = [source["secret"]["name"] for source in settings["projected"]["sources"] if "secret" in source]
    assert used == ["b", "c", "d"]


def test_secrets_that_are_made_differ_and_are_long():
    texts = [text for one in of_kind(render(), "Secret") for text in one["data"].values()]
    assert len(set(texts)) == 4 and all(len(text) == 64 for text in texts)
    assert not set(texts) & {text for one in of_kind(render(), "Secret") for text in one["data"].values()}


def test_a_headless_service_names_every_gateway():
    service = next(one for one in of_kind(render("defaults", "--set", "service.headless=true"), "Service"))
    assert service["metadata"]["name"] == "demo-trivium-gateway"
    assert service["spec"]["clusterIP"] == "None"


def test_a_long_or_odd_release_name_still_fits_kuberay():
    for release, name in (("trivium", "trivium"), ("7b", "t7b-trivium"), ("x" * 53, "x" * 40)):
        assert ray_service(render(release=release))["metadata"]["name"] == name


def test_rules_and_dashboards_are_taken_up_as_they_are(releases):
    manifests = releases["8xh200"]
    maps = of_kind(manifests, "ConfigMap")
    shown = {name: text for one in maps for name, text in one["data"].items() if name.endswith(".json")}
    assert set(shown) == {path.name for path in CHART.glob("dashboards/*.json")}
    for name, text in shown.items():
        assert json.loads(text) == json.loads((CHART / "dashboards" / name).read_text())
    files = sorted(CHART.glob("rules/*.yaml"))
    written = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    rules = of_kind(manifests, "PrometheusRule")
    assert [group for rule in rules for group in rule["spec"]["groups"]] == written


@pytest.fixture
def notes(tmp_path):
    """Renders what helm tells after an install; helm itself shows it to those alone who have a cluster."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    notes_file = '{{ include (print $.Template.BasePath "/NOTES.txt") . | nindent 2 }}'
    (chart / "templates/notes.yaml").write_text(f"notes: |{notes_file}\n")

    def rendered(*options: str) -> str:
        arguments = ("--namespace", "models", "--show-only", "templates/notes.yaml", *options)
        return yaml.safe_load(helm("template", "demo", chart, *arguments).stdout)["notes"]

    return rendered


def test_notes_say_how_to_reach_generate_and_scale(notes):
    for words in (
        "trivium generate",
        "trivium scale decode=2",
        "port-forward",
        "deployments/decode/scale",
        "demo-trivium-gateway.models:50051",
        "makes new ones each time",
    ):
        assert words in notes()
    assert "makes new ones each time" not in notes(
        *("--set", "secrets.rayToken=a", "--set", "secrets.channel=b", "--set", "secrets.gatewayToken=c"),
        *("--set", "secrets.operationsToken=d", "--set", "secrets.make=false"),
    )


def test_notes_give_each_command_its_own_token_and_the_address(notes):
    told = notes("--set", "config.gateway.port=6000", "--set", "secrets.gatewayTls=tls")
    commands = {
        line.split()[1]: line.split() for line in told.splitlines() if line.strip().startswith("trivium ")
    }
    assert set(commands) == {"generate", "scale"}
    files = {}
    for name, words in commands.items():
        assert words[words.index("--address") + 1] == "grpcs://127.0.0.1:6000"
        file = words[words.index("--token-file") + 1]
        [files[name]] = [line for line in told.splitlines() if line.endswith(f"> {file}")]
    assert "secret demo-trivium-gateway-token " in files["generate"]
    assert "secret demo-trivium-operations-token " in files["scale"]


def test_notes_say_by_which_name_a_certificate_is_known(notes):
    """It is for none that a forwarded port could be called by."""
    told = notes("--set", "secrets.gatewayTls=made-elsewhere")
    commands = [line.strip() for line in told.splitlines()]
    [asked] = [line for line in commands if line.endswith("> ca.crt")]
    assert "get secret made-elsewhere " in asked and r"ca\.crt" in asked
    [named] = [line for line in commands if line.startswith("export ")]
    assert f"{TRUSTED_FILE}=ca.crt" in named and f"{SHOWN_NAME}=demo-trivium-gateway" in named
    assert commands.index(named) < next(at for at, line in enumerate(commands) if "generate " in line)
    assert SHOWN_NAME not in notes()


def test_versions_agree():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["image"]["tag"].startswith(chart["appVersion"])
    minor = ".".join(values["ray"]["version"].split(".")[:2])
    assert f"ray[default,serve]>={minor}," in project


def test_gateways_speak_tls_where_a_secret_is_named(releases, tmp_path):
    manifests = releases["deepseek-v3-18-nodes"]
    gateway = checked_config(manifests, tmp_path).gateway
    assert (gateway.tls_certificate_file.name, gateway.tls_key_file.name) == ("tls.crt", "tls.key")
    templates = ray_templates(manifests)
    mounts = {
        name: {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        for name, template in templates.items()
    }
    folder = str(gateway.tls_key_file.parent)
    assert [name for name, paths in mounts.items() if folder in paths] == ["gateway"], (
        "only they have the key"
    )
    services = [one["spec"] for one in of_kind(manifests, "Service")]
    services.append(ray_service(manifests)["spec"]["serveService"]["spec"])
    said = [port["appProtocol"] for spec in services for port in spec["ports"] if port["name"] == "grpc"]
    assert said == ["https", "https"]
    probe = templates["gateway"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/healthz", "port": gateway.metrics_port}
    [test] = [one for one in of_kind(manifests, "Pod") if one["metadata"]["name"].endswith("-test")]
    for container in test["spec"]["containers"]:
        assert any(word.startswith("grpcs://") for word in container["command"])
        assert {"name": "TRIVIUM_TLS_CA", "value": "/etc/trivium-tls/ca.crt"} in container["env"]


def test_gateways_speak_none_where_none_is_named(releases, tmp_path):
    gateway = checked_config(releases["defaults"], tmp_path).gateway
    assert gateway.tls_certificate_file is None
    probe = ray_templates(releases["defaults"])["gateway"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["grpc"] == {"port": gateway.port}
