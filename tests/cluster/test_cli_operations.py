"""`trivium scale` and `trivium top` over a client that only notes what it was asked."""

import json
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from cluster import cli, cli_operations
from cluster.errors import InvalidRequest, NodeUnavailable
from cluster.proto import trivium_pb2
from tests.cluster.pools_told import EVIL, HARMLESS, cluster, pools, requests


class DirectClient:
    """What commands ask, in order, and the answers."""

    asked: ClassVar[list[tuple]] = []
    name = "somebody"

    def __init__(self, address: str, token: str | None):
        self.asked.append(("open", address, token))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing was opened."""

    async def get_pools(self):
        """As `Client` does."""
        return pools(self.name)

    async def scale_pool(self, kind: str, count: int | None, by: str):
        """As `Client` does."""
        if kind == "nowhere":
            raise InvalidRequest(
                "UNKNOWN_POOL", "there is no pool 'nowhere'", "kind", "one of decode", "Name it."
            )
        if kind == "silent":
            raise NodeUnavailable("RAY_DASHBOARD_SILENT", "the server did not do it", remedy="Start it.")
        self.asked.append(("scale", kind, count, by))
        return pools()

    async def release_pool(self, kind: str):
        """As `Client` does."""
        self.asked.append(("release", kind))
        return pools()

    async def get_cluster(self):
        """As `Client` does."""
        return cluster(self.name)

    async def get_experts(self):
        """As `Client` does; a model without experts."""
        return trivium_pb2.GetExpertsResponse()

    async def get_requests(self, requests_max: int):
        """As `Client` does."""
        self.asked.append(("requests", requests_max))
        return requests()


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[tuple]:
    """What was asked in this test."""
    calls: list[tuple] = []
    monkeypatch.setattr(DirectClient, "asked", calls)
    monkeypatch.setattr(cli_operations, "Client", DirectClient)
    monkeypatch.setattr(cli_operations.getpass, "getuser", lambda: "ada")
    return calls


def run(*arguments: str, columns_count: int = 300):
    """One command line."""
    monkeypatched = {"COLUMNS": str(columns_count), "TERM": "dumb", "TRIVIUM_ADDRESS": None}
    return CliRunner().invoke(cli.app, arguments, env=monkeypatched)


def test_counts_holds_and_releases_are_asked_for_in_order(asked):
    done = run(
        "scale", "decode=4", "prefill=2", "--hold", "experts", "--release", "gateway", "--address", "a:1"
    )
    assert done.exit_code == 0, done.output
    by = "trivium scale, ada"
    assert asked == [
        ("open", "a:1", None),
        ("release", "gateway"),
        ("scale", "decode", 4, by),
        ("scale", "prefill", 2, by),
        ("scale", "experts", None, by),
    ]
    assert "counts follow the load" in done.output and "3 by scale, somebody" in done.output


def test_without_arguments_nothing_changes(asked):
    assert run("scale").exit_code == 0
    assert [call[0] for call in asked] == ["open"]


def test_json_says_the_same():
    values = json.loads(run("scale", "--json").output)
    assert [pool["kind"] for pool in values["pools"]] == ["gateway", "prefill", "decode", "experts"]
    assert values["pools"][2]["hold"] == {"count": 3, "by": "scale, somebody", "age_s": 5.0}
    assert values["is_autoscaled"] is True


@pytest.mark.parametrize(
    "text", ["decode", "decode=", "decode=-1", "decode=1.5", "decode=²", "decode==4", "=x"]
)
def test_what_names_no_count_is_refused_before_anything_is_asked(asked, text: str):
    done = run("scale", "prefill=2", text)
    assert done.exit_code == 1 and "names no count" in done.output and "decode=4" in done.output
    assert asked == []


@pytest.mark.parametrize("json_output", [False, True])
@pytest.mark.parametrize(
    ("pool", "reason"), [("nowhere", "UNKNOWN_POOL"), ("silent", "RAY_DASHBOARD_SILENT")]
)
def test_refusals_are_told(pool: str, reason: str, json_output: bool):
    done = run("scale", f"{pool}=3", *(["--json"] if json_output else []))
    assert done.exit_code == 1
    if json_output:
        assert json.loads(done.stdout)["error"]["reason"] == reason
    else:
        assert "error" in done.output and "Traceback" not in done.output


def test_a_user_without_a_name_can_scale_too(asked, monkeypatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(cli_operations.getpass, "getuser", nameless)
    assert run("scale", "decode=4").exit_code == 0
    assert asked[-1][:3] == ("scale", "decode", 4) and asked[-1][3]


def test_a_token_is_read_from_its_file(asked, tmp_path):
    (tmp_path / "token").write_text("of operators\n")
    assert run("scale", "--token-file", str(tmp_path / "token")).exit_code == 0
    assert asked[0][2] == "of operators"
    assert run("scale", "--token-file", str(tmp_path / "nothing")).exit_code == 1


def test_top_shows_everything_once(asked):
    done = run("top", "--once")
    assert done.exit_code == 0, done.output
    for words in ("counts follow the load", "nodes", "1000 requests under way", "decisions"):
        assert words in done.output
    assert ("requests", 10) in asked


def test_names_do_nothing_to_the_screen(monkeypatch):
    monkeypatch.setattr(DirectClient, "name", EVIL)
    for arguments in (("scale",), ("top", "--once")):
        done = run(*arguments)
        assert HARMLESS in done.output and "\x1b" not in done.output and "\x07" not in done.output


@pytest.mark.parametrize("period", ["0", "61", "-1"])
def test_looks_are_not_too_close(period: str):
    assert run("top", "--once", "--period-s", period).exit_code == 2
