"""What no release of the chart may do, as functions of its manifests: each returns breaches as sentences."""

import re
from fractions import Fraction

from tests.helm.kuberay import misfits, refusals
from tests.helm.rendering import Manifest, containers, of_kind, pods, ray_service, ray_templates, serve_config

NAME_LENGTH_MAX = 63
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|PRIVATE|API_?KEY", re.IGNORECASE)
UNITS = {"": 1, "m": Fraction(1, 1000), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(quantity: str | int) -> Fraction:
    """A Kubernetes quantity as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(quantity))
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity")
    return Fraction(match[1]) * UNITS[match[2]]


def ray_without_token(manifests: list[Manifest]) -> list[str]:
    """Whoever speaks to Ray without its token runs code in it."""
    options = ray_service(manifests)["spec"]["rayClusterConfig"].get("authOptions", {})
    breaches = [] if options.get("mode") == "token" else ["authOptions.mode is not token"]
    return breaches + ([] if options.get("secretName") else ["no Secret holds Ray's token"])


def root(manifests: list[Manifest]) -> list[str]:
    """Every pod and container runs as a user that is not root."""
    breaches = []
    for name, pod in pods(manifests).items():
        context = pod["spec"].get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            breaches.append(f"{name}: runs as root")
        breaches += [
            f"{name}.{container['name']}: runs as root"
            for container in containers(pod)
            if container["securityContext"].get("runAsUser", 1) == 0
            or not container["securityContext"].get("runAsNonRoot")
        ]
    return breaches


def writable_root(manifests: list[Manifest]) -> list[str]:
    """No container writes to its image, so that what is written has a limit and an end."""
    return [
        f"{where}: its file system can be written"
        for where, context in _contexts(manifests)
        if context.get("readOnlyRootFilesystem") is not True
    ]


def privilege(manifests: list[Manifest]) -> list[str]:
    """No container may gain rights; no pod shares its host's network, processes or memory."""
    breaches = [
        f"{where}: may gain rights"
        for where, context in _contexts(manifests)
        if context.get("privileged")
        or context.get("allowPrivilegeEscalation") is not False
        or context.get("capabilities") != {"drop": ["ALL"]}
    ]
    for name, pod in pods(manifests).items():
        shared = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod["spec"].get(key)]
        breaches += [f"{name}: has {key}" for key in shared]
        if pod["spec"]["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
            breaches.append(f"{name}: no seccomp profile")
        if "unconfined" in pod["metadata"].get("annotations", {}).values():
            breaches.append(f"{name}: an annotation takes a confinement away")
        if pod["spec"].get("automountServiceAccountToken") is not False:
            breaches.append(f"{name}: a token of Kubernetes' API is mounted")
    return breaches


def open_port(manifests: list[Manifest]) -> list[str]:
    """Policies select every pod, deny by default in both directions, and allow nobody without a name."""
    policies = of_kind(manifests, "NetworkPolicy")
    breaches = []
    for name, pod in pods(manifests).items():
        labels = pod["metadata"]["labels"]
        closed = {
            kind
            for policy in policies
            if selects(policy["spec"]["podSelector"].get("matchLabels", {}), labels)
            for kind in policy["spec"]["policyTypes"]
        }
        breaches += [f"{name}: {kind} is open" for kind in ("Ingress", "Egress") if kind not in closed]
    for policy in policies:
        for peers in _peers(policy):
            if not peers or any(_is_anybody(peer) for peer in peers):
                breaches.append(f"{policy['metadata']['name']}: allows everybody")
    return breaches + [
        f"{service['metadata']['name']}: {service['spec']['type']} is seen from outside"
        for service in of_kind(manifests, "Service")
        if service["spec"].get("type", "ClusterIP") != "ClusterIP"
    ]


def unbounded_container(manifests: list[Manifest]) -> list[str]:
    """Every container asks for cpu and memory and is held to a limit, and so is every volume."""
    breaches = []
    for name, pod in pods(manifests).items():
        for container in containers(pod):
            asked = container.get("resources", {}).get("requests", {})
            limits = container.get("resources", {}).get("limits", {})
            where = f"{name}.{container['name']}"
            breaches += [
                f"{where}: no {key}" for key in ("cpu", "memory") if not (key in asked and key in limits)
            ]
            breaches += [
                f"{where}: asks for {asked[key]} {key} and may have {limits.get(key)}"
                for key in asked
                if key not in limits or amount(asked[key]) > amount(limits[key])
            ]
        breaches += [
            f"{name}: volume {volume['name']} has no limit"
            for volume in pod["spec"].get("volumes", [])
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]
        ]
    return breaches


def untagged_image(manifests: list[Manifest]) -> list[str]:
    """An image without a tag, or with one that moves, is another one tomorrow."""
    return [
        f"{name}.{container['name']}: {container['image']}"
        for name, pod in pods(manifests).items()
        for container in containers(pod)
        if not re.search(r":[^/:]+$", container["image"]) or container["image"].endswith(":latest")
    ]


def plain_secret(manifests: list[Manifest]) -> list[str]:
    """Secrets are mounted as files, never written into a pod's environment or a ConfigMap."""
    breaches = [
        f"{name}.{container['name']}: {variable['name']}"
        for name, pod in pods(manifests).items()
        for container in containers(pod)
        for variable in container.get("env", [])
        if SECRET_NAMES.search(variable["name"]) and "value" in variable
    ]
    known = [text for secret in of_kind(manifests, "Secret") for text in secret["data"].values()]
    return breaches + [
        f"{config['metadata']['name']}: holds a secret"
        for config in of_kind(manifests, "ConfigMap")
        for text in config["data"].values()
        if any(secret in text for secret in known)
    ]


def short_grace(manifests: list[Manifest]) -> list[str]:
    """A pod has at least the time that its preStop command is told to take."""
    breaches = []
    for name, pod in ray_templates(manifests).items():
        command = (
            pod["spec"]["containers"][0]
            .get("lifecycle", {})
            .get("preStop", {})
            .get("exec", {})
            .get("command", [])
        )
        takes_s = sum(int(part) for part in command if part.isdigit())
        if not takes_s or pod["spec"].get("terminationGracePeriodSeconds", 30) < takes_s:
            breaches.append(f"{name}: is killed before its actors could finish")
    return breaches


def unguarded_pool(manifests: list[Manifest]) -> list[str]:
    """Each group of pods has one PodDisruptionBudget, which keeps at least one pod and counts by number."""
    breaches = []
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for name, pod in ray_templates(manifests).items():
        labels = pod["metadata"]["labels"]
        guards = [one for one in budgets if selects(one["spec"]["selector"]["matchLabels"], labels)]
        if len(guards) != 1 or not isinstance(guards[0]["spec"].get("minAvailable"), int):
            breaches.append(f"{name}: {len(guards)} budgets with a number")
        elif guards[0]["spec"]["minAvailable"] < 1:
            breaches.append(f"{name}: its budget guards no pod")
    return breaches


def wrong_name(manifests: list[Manifest]) -> list[str]:
    """Names and labels fit Kubernetes, and no two objects of a kind share one."""
    breaches = []
    for manifest in manifests:
        name, labels = manifest["metadata"]["name"], manifest["metadata"].get("labels", {})
        if len(name) > NAME_LENGTH_MAX or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            breaches.append(f"{manifest['kind']} {name}: no DNS label")
        breaches += [
            f"{manifest['kind']} {name}: label {key}"
            for key, value in labels.items()
            if len(value) > NAME_LENGTH_MAX
            or not re.fullmatch(r"[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?", value)
        ]
    named = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    return breaches + [
        f"{kind} {name}: twice" for kind, name in sorted({one for one in named if named.count(one) > 1})
    ]


def blind_selector(manifests: list[Manifest]) -> list[str]:
    """A Service finds pods that have its port; monitors find something."""
    breaches = []
    for service in of_kind(manifests, "Service"):
        chosen = [
            pod
            for pod in pods(manifests).values()
            if selects(service["spec"]["selector"], pod["metadata"]["labels"])
        ]
        ports = {port["name"] for pod in chosen for port in pod["spec"]["containers"][0].get("ports", [])}
        wanted = {port["targetPort"] for port in service["spec"]["ports"]}
        if len(chosen) != 1 or not wanted <= ports:
            breaches.append(f"{service['metadata']['name']}: selects {len(chosen)} groups with ports {ports}")
    seen = [one["metadata"]["labels"] for one in [*pods(manifests).values(), *of_kind(manifests, "Service")]]
    for kind in ("PodMonitor", "ServiceMonitor"):
        for monitor in of_kind(manifests, kind):
            wanted_labels = monitor["spec"]["selector"]["matchLabels"]
            if not any(selects(wanted_labels, labels) for labels in seen):
                breaches.append(f"{kind}: sees nothing")
    return breaches


def served_by_proxy(manifests: list[Manifest]) -> list[str]:
    """Tokens never go through Serve's proxies, and counts are set from outside."""
    config = serve_config(manifests)
    [application] = config["applications"]
    breaches = [] if config.get("proxy_location") == "Disabled" else ["proxies are on"]
    if application.get("route_prefix", "/") is not None:
        breaches.append("the application has a route")
    if application.get("external_scaler_enabled") is not True:
        breaches.append("nobody may scale a pool")
    return breaches


def foreign_to_kuberay(manifests: list[Manifest]) -> list[str]:
    """KubeRay 1.7 knows every field and refuses none."""
    service = ray_service(manifests)
    return misfits(service["spec"]) or refusals(service)


POLICIES = (
    ray_without_token,
    root,
    writable_root,
    privilege,
    open_port,
    unbounded_container,
    untagged_image,
    plain_secret,
    short_grace,
    unguarded_pool,
    wrong_name,
    blind_selector,
    served_by_proxy,
    foreign_to_kuberay,
)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a selector takes what has these labels; an empty one takes everything."""
    return selector.items() <= labels.items()


def _contexts(manifests: list[Manifest]) -> list[tuple[str, Manifest]]:
    """The security context of each container, the autoscaler's too, after its name."""
    found = [
        (f"{name}.{container['name']}", container.get("securityContext", {}))
        for name, pod in pods(manifests).items()
        for container in containers(pod)
    ]
    options = ray_service(manifests)["spec"]["rayClusterConfig"].get("autoscalerOptions")
    return found + ([("head.autoscaler", options.get("securityContext", {}))] if options else [])


def _peers(policy: Manifest) -> list[list[Manifest]]:
    """Whom each rule of a policy names; a rule without names, which lets all pass, as an empty list."""
    rules = [rule.get("from", []) for rule in policy["spec"].get("ingress", [])]
    return rules + [rule.get("to", []) for rule in policy["spec"].get("egress", [])]


def _is_anybody(peer: Manifest) -> bool:
    if "ipBlock" in peer:
        return peer["ipBlock"]["cidr"] in ("0.0.0.0/0", "::/0")
    # anybody may give a pod whatever labels in a namespace of their own
    return "namespaceSelector" in peer and not peer["namespaceSelector"]
