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


@pytest.fixture
def serving(tmp_path: Path):
    """A cluster with its dashboard, started by the command line; its address and the dashboard's."""
    config = tmp_path / "cluster.yaml"
    config.write_text(
        f"model: {{folder: {Path(SMALL).resolve()}}}\ngateway: {{port: 0}}\ndashboard: {{port: 0}}\n"
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


def applications(dashboard: str) -> dict:
    """What Ray's dashboard server tells of Serve."""
    token_file = Path.home() / ".ray" / "auth_token"
    headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"} if token_file.exists() else {}
    request = urllib.request.Request(f"http://{dashboard}/api/serve/applications/", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["applications"]


def test_serve_generate_status_reference(serving, stage):
    stage.clear()
    address, dashboard = serving
    ours = answer("generate", *PROMPT, "--address", address)
    assert ours["token_ids"] == answer("reference", *PROMPT, "--model", SMALL)["token_ids"]
    assert ours["finish_reason"] == "length"
    status = answer("status", "--address", address, "--json")
    kinds = sorted(node["kind"] for node in status["cluster"]["nodes"])
    assert kinds == ["NODE_KIND_DECODE", "NODE_KIND_GATEWAY", "NODE_KIND_PREFILL"]
    assert len(status["cluster"]["shards"]) == 2
    pools = applications(dashboard)["trivium"]["deployments"]
    assert set(pools) == {"gateway", "prefill", "decode", "experts", "coordinator"}
