"""The image as far as its recipe tells: two targets, pinned, without root and without secrets."""

import re

import yaml

from tests.helm.rendering import CHART, ROOT, containers, ray_templates

TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n", " ", TEXT).splitlines()


def stages() -> dict[str, list[str]]:
    """Instructions of each stage, after the name of the stage that it starts from."""
    found, name = {}, ""
    for line in LINES:
        match = re.fullmatch(r"FROM (\S+) AS (\S+)", line)
        if match:
            name = match[2]
            found[name] = [match[1]]
        elif name and line and not line.startswith("#"):
            found[name].append(line)
    return found


def test_both_targets_run_as_the_user_of_the_chart():
    user = yaml.safe_load((CHART / "values.yaml").read_text())["security"]
    for target in ("cpu", "cuda"):
        assert [line for line in stages()[target] if line.startswith("USER")] == [
            f"USER {user['userId']}:{user['groupId']}"
        ]


def test_every_base_is_pinned_or_a_stage():
    pinned = re.search(r"^ARG PYTHON=(\S+)$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", pinned[1])
    for name, (base, *_) in stages().items():
        assert base in stages() or (name, base) == ("base", "python:${PYTHON}")
    assert re.findall(r"^ARG TORCH=(\S+)$", TEXT, re.MULTILINE) == ["2.13.0", "2.13.0"]


def test_machine_code_is_compiled_where_the_pods_copy_it_from(releases):
    for name in ("cpu-build", "cuda-build"):
        assert "ENV NUMBA_CACHE_DIR=/opt/trivium/machine-code" in stages()[name]
        assert any("experts.prepare" in line for line in stages()[name])
    for template in ray_templates(releases["defaults"]).values():
        copying = containers(template)[0]["command"]
        assert copying == ["cp", "-r", "/opt/trivium/machine-code/.", "/var/cache/trivium"]


def test_no_secret_and_nothing_beside_the_sources_comes_in():
    assert not re.search(r"TOKEN|SECRET|PASSWORD|--build-arg", "\n".join(LINES))
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert allowed == {
        *("LICENSE", "README.md", "pyproject.toml"),
        *("cluster", "prefill", "decode", "experts", "kernels"),
    }
