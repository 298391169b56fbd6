"""`trivium serve` as people run it: it comes up, answers, is seen in the dashboard, and leaves nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.end_to_end.stage import wait_until

SMALL = "examples/trivium-small"
PROMPT = ("The place where three roads meet", "--temperature", "0", "--max-tokens", "16", "--json")


def command(*arguments: str) -> list[str]:
    """A `trivium` command line."""
    return [sys.executable, "-m", "cluster.cli", *arguments]


def answer(*arguments: str) -> dict:
    """The JSON that a command prints."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def serving(stage, tmp_path_factory: pytest.TempPathFactory):
    """A cluster with its dashboard, started by the command line; its address and the dashboard's."""
    stage.clear()
    config = tmp_path_factory.mktemp("serve") / "cluster.yaml"
    config.write_text(
        f"model: {{folder: {Path(SMALL).resolve()}}}\ngateway: {{port: 0}}\ndashboard: {{port: 0}}\n"
        "operations: {port: 0}\n"
    )
    process = subprocess.Popen(
        command("serve", str(config)), stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    said = ""
    while "Ctrl-C" not in said:
        line = process.stdout.readline()
        assert line, f"it ended: {said}"
        said += line
    yield re.search(r"serving at (\S+)", said)[1], re.search(r"http://(\S+)", said)[1]
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def ask_dashboard(dashboard: str, path: str, body: dict | None = None) -> dict:
    """What Ray's dashboard server answers."""
    token_file = Path.home() / ".ray" / "auth_token"
    headers = {"Content-Type": "application/json"}
    if token_file.exists():
        headers["Authorization"] = f"Bearer {token_file.read_text().strip()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{dashboard}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or b"{}")


def test_serve_generate_status_reference(serving):
    address, dashboard = serving
    ours = answer("generate", *PROMPT, "--address", address)
    assert ours["token_ids"] == answer("reference", *PROMPT, "--model", SMALL)["token_ids"]
    assert ours["finish_reason"] == "length"
    status = answer("status", "--address", address, "--json")
    kinds = sorted(node["kind"] for node in status["cluster"]["nodes"])
    assert kinds == ["NODE_KIND_DECODE", "NODE_KIND_GATEWAY", "NODE_KIND_PREFILL"]
    assert len(status["cluster"]["shards"]) == 2
    pools = ask_dashboard(dashboard, "/api/serve/applications/")["applications"]["trivium"]["deployments"]
    assert set(pools) == {"gateway", "prefill", "decode", "experts", "coordinator"}


def test_the_python_in_the_readme(serving):
    [example] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    address, _ = serving
    done = subprocess.run(
        [sys.executable, "-c", example.replace("127.0.0.1:50051", address)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_dashboards_server_scales_a_pool_up_and_down(serving):
    address, dashboard = serving
    scale = "/api/v1/applications/trivium/deployments/decode/scale"

    def decode_nodes_count() -> int:
        nodes = answer("status", "--address", address, "--json")["cluster"]["nodes"]
        return sum(node["kind"] == "NODE_KIND_DECODE" and node["state"] == "STATE_READY" for node in nodes)

    for count in (2, 1):
        ask_dashboard(dashboard, scale, {"target_num_replicas": count})
        assert wait_until(lambda count=count: decode_nodes_count() == count, 60.0)
        ours = answer("generate", *PROMPT, "--address", address)
        assert len(ours["token_ids"]) == 16
