"""What `trivium serve` decides before and while it starts, and how it ends; Ray itself stays out."""

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import launch
from cluster.config import ClusterConfig, check_config
from cluster.errors import InvalidConfig, InvalidModel
from cluster.view import STARTING, Member, View
from decode.messages import NodeReport
from experts.messages import Placement

SMALL = "examples/trivium-small"


def config_of(**sections) -> ClusterConfig:
    """A configuration of the example model that takes any ports."""
    values = {"model": {"folder": SMALL}, "gateway": {"port": 0}, "dashboard": {"port": 0}}
    values |= {"operations": {"port": 0}}
    return check_config(values | sections, "test", Path.cwd())


def view_of(**counts: int) -> View:
    """A view of so many members of each kind."""
    members = []
    for kind, count in counts.items():
        for index in range(count):
            name = f"{kind}-{index}"
            report = None
            if kind in ("prefill", "decode"):
                report = NodeReport(name, kind, "unix:///x", 0, 0, 0, 9, 9, 0, 0, 0, 0, 1, 0)
            members.append(Member(name, kind, f"unix:///{name}", report=report))
    placement = Placement(1, 1, (), ())
    return View(tuple(members), placement, placement)


@pytest.fixture
def ray(monkeypatch) -> list:
    """Pools that only note what they are told."""
    said: list = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch.pools, "start_ray", lambda *_: said.append("start") or "")
    monkeypatch.setattr(launch.pools, "deploy", lambda _: said.append("deploy"))
    monkeypatch.setattr(launch.pools, "stop", lambda is_deployed: said.append(("stop", is_deployed)))
    monkeypatch.setattr(launch.pools, "problems", list)
    monkeypatch.setattr(launch.pools, "pools_page", str)
    monkeypatch.setattr(launch.pools, "view", lambda: view_of(gateway=1, prefill=1, decode=1, experts=2))
    return said


@pytest.fixture
def folders(monkeypatch, tmp_path) -> Path:
    """Where sockets folders are made; and signals as they were, afterwards."""
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))
    numbers = (signal.SIGINT, *launch.SIGNALS)
    before = {number: signal.getsignal(number) for number in numbers}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def run_main(config: ClusterConfig, **flags) -> int:
    """The status that `trivium serve` ends with."""
    try:
        launch.main(config.model_dump_json(), **flags)
    except SystemExit as end:
        return end.code
    return 0


def test_complete_means_all_ready():
    config = config_of(decode={"count": 2})
    assert launch.is_complete(view_of(gateway=1, prefill=1, decode=2, experts=2), config)
    for missing in ("gateway", "prefill", "decode", "experts"):
        counts = {"gateway": 1, "prefill": 1, "decode": 2, "experts": 2}
        counts[missing] -= 1
        assert not launch.is_complete(view_of(**counts), config), missing
    view = view_of(gateway=1, prefill=1, decode=2, experts=2)
    starting = tuple(
        replace(member, state=STARTING) if member.name == "decode-1" else member for member in view.members
    )
    assert not launch.is_complete(replace(view, members=starting), config)


def test_a_pool_that_was_whole_once_is_not_awaited_again(ray, folders, monkeypatch):
    """The autoscaler may shrink it while another pool loads."""
    looks = [
        view_of(gateway=1, prefill=2, decode=0, experts=2),
        view_of(gateway=1, prefill=1, decode=1, experts=2),
        view_of(gateway=1, prefill=1, decode=2, experts=2),
    ]
    left = iter(looks)
    monkeypatch.setattr(launch, "POLL_S", 0.0)
    monkeypatch.setattr(launch.pools, "view", lambda: next(left))
    cluster = launch.Cluster(config_of(prefill={"count": 2}, decode={"count": 2}))
    assert cluster.start(lambda _: None, lambda _: None) is looks[-1]


def test_a_taken_port_is_told_before_anything_starts(ray, folders, capsys):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another gateway has it
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_main(config_of(gateway={"port": port})) == 1
        assert "gateway.port" in capsys.readouterr().err
        assert run_main(config_of(dashboard={"port": port})) == 1
        assert "dashboard.port" in capsys.readouterr().err
        launch.check_surroundings(config_of(dashboard={"port": port, "enabled": False}))
    assert ray == [("stop", False)] * 2
    assert list(folders.iterdir()) == []
    launch.check_port("127.0.0.1", port, "gateway.port")


def test_foreign_hosts_and_bad_models_are_told(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InvalidConfig):
        launch.check_port("203.0.113.1", 0, "gateway.port")
    with pytest.raises(InvalidModel):
        launch.check_model(config_of(model={"folder": "tests"}))
    launch.check_model(config_of(experts={"shards_count": 16}))
    for experts in ({"shards_count": 17}, {"shards_max": 17}, {"shards_count": 2, "replicas_min": 3}):
        with pytest.raises(InvalidConfig) as caught:
            launch.check_model(config_of(experts=experts))
        assert caught.value.limit in ("1 to 16", "3 to 16") and caught.value.remedy


def test_once_greets_and_ends_with_0(ray, folders, monkeypatch):
    greeted = []

    async def greet(address: str, token: str | None) -> None:
        greeted.append((address, token))

    monkeypatch.setattr(launch, "greet", greet)
    assert run_main(config_of(), once=True) == 0
    assert greeted == [("unix:///gateway-0", None)]
    assert ray == ["start", "deploy", ("stop", True)]
    assert list(folders.iterdir()) == []


def test_pools_that_cannot_start_are_told_at_once(ray, folders, monkeypatch, capsys):
    monkeypatch.setattr(launch.pools, "view", View)
    monkeypatch.setattr(launch.pools, "problems", lambda: ["decode: [/it] failed"])
    assert run_main(config_of()) == 1
    assert "decode: [/it] failed" in " ".join(capsys.readouterr().err.split())
    assert list(folders.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("stage", ["start_ray", "deploy", "view"])
def test_a_signal_at_any_stage_leaves_nothing(ray, folders, monkeypatch, stage, number, status):
    monkeypatch.setattr(launch.pools, stage, lambda *_: os.kill(os.getpid(), number))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(is_deployed: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # impatience must not leave things half ended
        ray.append("stopped")

    monkeypatch.setattr(launch.pools, "stop", stop)
    assert run_main(config_of()) == status
    assert ray[-1] == "stopped"
    assert list(folders.iterdir()) == []
