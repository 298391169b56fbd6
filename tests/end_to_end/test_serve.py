"""`trivium serve` as people run it: it answers, shows in the dashboard, follows the load, leaves nothing."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.autoscaler import DASHBOARD
from cluster.client import Client
from cluster.validation import RequestedGeneration, RequestedSampling
from tests.end_to_end.stage import one_by_one, tokens_of, wait_until

SMALL = "examples/trivium-small"
CONFIG = {
    "gateway": {"port": 0},
    "dashboard": {"port": 0},
    "operations": {"port": 0},
    "autoscaler": {
        "enabled": True,
        "period_s": 0.5,
        "grow_pause_s": 2.0,
        "shrink_pause_s": 5.0,
        "time_to_first_token_s": 0.4,
        "inter_token_s": 60.0,  # decode grows by its pages alone
    },
    "prefill": {"count_max": 2, "latents_bytes": "64MiB"},
    "decode": {"count_max": 2, "latents_bytes": "256MiB"},
}
SCALE_DECODE = "/api/v1/applications/trivium/deployments/decode/scale"
GROWTH_S, SHRINK_S = 60.0, 90.0
CHECKED_COUNT = 2
SEND_GAP_S = 0.03
PROMPTS_RUNNING = (
    12  # of 600 tokens: seconds of work for a prefill node, and less than half of decode's pages
)
ANSWERS_RUNNING = 60  # of up to 540 tokens: more than decode's pages hold
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
        json.dumps(CONFIG | {"model": {"folder": str(Path(SMALL).resolve())}})  # JSON is YAML
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

    def decode_nodes_count() -> int:
        nodes = answer("status", "--address", address, "--json")["cluster"]["nodes"]
        return sum(node["kind"] == "NODE_KIND_DECODE" and node["state"] == "STATE_READY" for node in nodes)

    for count in (2, 1):
        ask_dashboard(dashboard, SCALE_DECODE, {"target_num_replicas": count})
        assert wait_until(lambda count=count: decode_nodes_count() == count, 60.0)
        ours = answer("generate", *PROMPT, "--address", address)
        assert len(ours["token_ids"]) == 16
    pools = {pool["kind"]: pool for pool in answer("scale", "--address", address, "--json")["pools"]}
    assert (pools["decode"]["hold"]["count"], pools["decode"]["hold"]["by"]) == (1, DASHBOARD)
    answer("scale", "--release", "decode", "--address", address, "--json")


def greedy(tokens_max: int) -> RequestedSampling:
    return RequestedSampling(temperature=0.0, tokens_max=tokens_max, ignore_eos=True)


def prompt(random_: random.Random, length: int) -> tuple[int, ...]:
    return tuple(random_.randrange(10, 1000) for _ in range(length))


class Watch:
    """Notes every count that the dashboard's API shows, until it is left."""

    def __init__(self, address: str, dashboard: str):
        self.seen: list[dict[str, int]] = []
        self.ready_counts: dict[str, int] = {}
        self._address, self._dashboard = address, dashboard
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            self.seen.append(targets(self._dashboard))
            self.ready_counts = ready_counts(self._address)

    def sees_two(self, kind: str) -> bool:
        return self.ready_counts.get(kind) == 2

    def most(self, pool: str) -> int:
        return max((counts[pool] for counts in self.seen), default=0)


async def burst(
    address: str, make: Callable[[], RequestedGeneration], running_count: int, enough: Callable[[], bool]
) -> list[tuple[RequestedGeneration, list[int]]]:
    """Keep so many requests running until `enough` says so; each one with its tokens."""
    async with Client(address) as client:
        answers, requests, end_s = [], [], time.monotonic() + GROWTH_S
        while time.monotonic() < end_s and not enough():
            if sum(not one.done() for one in answers) < running_count:
                requests.append(make())
                answers.append(asyncio.create_task(tokens_of(client, requests[-1])))
            await asyncio.sleep(SEND_GAP_S)
        return list(zip(requests, await asyncio.gather(*answers), strict=True))


def assert_as_if_alone(address: str, answered: list[tuple[RequestedGeneration, list[int]]]) -> None:
    """Some requests of a burst give the same tokens when they are sent alone."""
    some = random.Random(len(answered)).sample(answered, CHECKED_COUNT)
    assert one_by_one(address, [request for request, _ in some]) == [tokens for _, tokens in some]
    assert all(len(tokens) == request.sampling.tokens_max for request, tokens in answered)


def ready_counts(address: str) -> dict[str, int]:
    """Nodes and shards that serve, by pool."""
    return {pool.kind: pool.ready_count for pool in pools_of(address).pools}


def targets(dashboard: str) -> dict[str, int]:
    """How many actors of each pool the dashboard's server says that Serve aims at."""
    told = ask_dashboard(dashboard, "/api/serve/applications/")["applications"]["trivium"]["deployments"]
    return {kind: deployment["target_num_replicas"] for kind, deployment in told.items()}


@pytest.mark.timeout(400)
def test_a_burst_makes_pools_grow_separately_and_come_down_again(serving):
    address, dashboard = serving
    random_ = random.Random(5)

    def long_prompt() -> RequestedGeneration:
        return RequestedGeneration(token_ids=prompt(random_, 600), sampling=greedy(2))

    def long_answer() -> RequestedGeneration:
        return RequestedGeneration(token_ids=prompt(random_, 40), sampling=greedy(500))

    assert wait_until(
        lambda: (targets(dashboard)["prefill"], targets(dashboard)["decode"]) == (1, 1), SHRINK_S
    )
    with Watch(address, dashboard) as watch:
        prompts = asyncio.run(burst(address, long_prompt, PROMPTS_RUNNING, lambda: watch.sees_two("prefill")))
    assert watch.most("prefill") == 2, "prompts waited, so there were more to read them"
    assert watch.most("decode") == 1, "and nobody more to write"
    assert watch.most("experts") == 2
    with Watch(address, dashboard) as watch:
        answers = asyncio.run(burst(address, long_answer, ANSWERS_RUNNING, lambda: watch.sees_two("decode")))
    assert watch.most("decode") == 2, "pages were taken, so there were more to write"

    def is_small() -> bool:
        aims, ready = targets(dashboard), ready_counts(address)
        return all(counts[kind] == 1 for counts in (aims, ready) for kind in ("prefill", "decode"))

    assert wait_until(is_small, SHRINK_S)
    assert_as_if_alone(address, prompts)
    assert_as_if_alone(address, answers)

    # a person's count holds, whatever the load says, until it is released
    ask_dashboard(dashboard, SCALE_DECODE, {"target_num_replicas": 2})
    assert wait_until(lambda: ready_counts(address)["decode"] == 2, 60)
    end_s = time.monotonic() + 1.6 * CONFIG["autoscaler"]["shrink_pause_s"]
    while time.monotonic() < end_s:
        assert targets(dashboard)["decode"] == 2
        time.sleep(0.5)
    told = {pool.kind: pool for pool in pools_of(address).pools}
    assert (told["decode"].hold.count, told["decode"].hold.by) == (2, DASHBOARD)
    assert not told["prefill"].HasField("hold")
    asyncio.run(release(address, "decode"))
    assert wait_until(lambda: targets(dashboard)["decode"] == 1, SHRINK_S)
    reasons = [decision.reason for decision in pools_of(address).decisions]
    assert all(reasons)


def pools_of(address: str):
    """What the operators' service tells of pools."""

    async def ask():
        async with Client(address) as client:
            return await client.get_pools()

    return asyncio.run(ask())


async def release(address: str, kind: str) -> None:
    async with Client(address) as client:
        await client.release_pool(kind)
