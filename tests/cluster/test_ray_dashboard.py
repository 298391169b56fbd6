"""The dashboard server's calls, and all the ways in which it does not do what it was asked."""

import asyncio
import json
from dataclasses import replace

import pytest
from aiohttp import web

from cluster import coordinator_call, ray_dashboard
from cluster.errors import NodeUnavailable
from cluster.ray_dashboard import DashboardAccess, PoolTarget, RayDashboard, read_target
from tests.cluster.ray_server import APPLICATION, ray_server


def test_targets_are_counted_by_state():
    async def ask() -> None:
        async with (
            ray_server(decode=4, prefill=1) as (ray, access),
            RayDashboard(access, APPLICATION) as ours,
        ):
            ray.states["decode"] = ["RUNNING", "PENDING_MIGRATION", "STARTING", "STOPPING", "UPDATING"]
            assert await ours.targets() == {
                "decode": PoolTarget(4, starting_count=2, stopping_count=1),
                "prefill": PoolTarget(1, starting_count=0, stopping_count=0),
            }

    asyncio.run(ask())


def test_a_state_that_nobody_knows_is_no_node_yet():
    told = {"target_num_replicas": 1, "replicas": [{"state": "A_NEW_ONE"}]}
    assert read_target(told) == PoolTarget(1, 1, 0)


def test_scaling_is_asked_for_as_ray_wants_it():
    async def ask() -> None:
        async with ray_server(decode=1) as (ray, access), RayDashboard(access, APPLICATION) as ours:
            await ours.scale("decode", 3)
            assert ray.asked == [("decode", 3)] and (await ours.targets())["decode"].target_count == 3
            with pytest.raises(NodeUnavailable, match="it answers 404"):
                await ours.scale("nowhere", 3)
            assert ray.asked == [("decode", 3)]

    asyncio.run(ask())


def test_without_the_token_nothing_is_done():
    async def ask() -> None:
        async with ray_server(decode=1) as (ray, access):
            stranger = replace(access, headers={})
            async with RayDashboard(stranger, APPLICATION) as ours:
                with pytest.raises(NodeUnavailable, match="it answers 401"):
                    await ours.scale("decode", 3)
            assert ray.asked == []

    asyncio.run(ask())


def test_the_token_is_not_shown():
    assert "secret" not in repr(DashboardAccess("http://a", {"Authorization": "Bearer secret"}))


def told(text: str, status: int = 200):
    """Answers the same whatever is asked."""

    async def answer() -> web.Response:
        return web.Response(text=text, status=status, content_type="application/json")

    return answer


async def silence() -> web.Response:
    """Answers too late."""
    await asyncio.sleep(1.0)
    return web.Response()


def deployed(**values: object) -> str:
    return json.dumps({"applications": {APPLICATION: {"deployments": {"decode": values}}}})


GARBAGE = [
    "",
    "not json",
    "null",
    "[]",
    "7",
    "{}",
    '{"applications": {}}',
    '{"applications": {"trivium": null}}',
    '{"applications": {"trivium": {"deployments": [1]}}}',
    deployed(),
    deployed(target_num_replicas=1),
    deployed(target_num_replicas=None, replicas=[]),
    deployed(target_num_replicas="many", replicas=[]),
    deployed(target_num_replicas=1, replicas=[7]),
    deployed(target_num_replicas=1, replicas=[{}]),
]


@pytest.mark.parametrize("text", GARBAGE)
def test_what_tells_nothing_of_pools_is_no_answer(text: str):
    async def ask() -> None:
        async with ray_server(decode=1) as (ray, access), RayDashboard(access, APPLICATION) as ours:
            ray.instead = told(text)
            with pytest.raises(NodeUnavailable) as caught:
                await ours.targets()
            assert caught.value.reason == "RAY_DASHBOARD_SILENT"
            assert "dashboard.enabled" in caught.value.remedy
            ray.instead = None
            assert (await ours.targets())["decode"].target_count == 1

    asyncio.run(ask())


@pytest.mark.parametrize("status", [302, 403, 405, 412, 500, 503])
def test_a_refusal_is_told(status: int):
    async def ask() -> None:
        async with ray_server(decode=1) as (ray, access), RayDashboard(access, APPLICATION) as ours:
            ray.instead = told('{"error": "Internal Server Error"}', status)
            for call in (ours.targets(), ours.scale("decode", 2)):
                with pytest.raises(NodeUnavailable, match=f"it answers {status}"):
                    await call

    asyncio.run(ask())


def test_silence_and_absence_are_told(monkeypatch):
    monkeypatch.setattr(ray_dashboard, "ANSWER_S", 0.05)

    async def ask() -> None:
        async with ray_server(decode=1) as (ray, access), RayDashboard(access, APPLICATION) as ours:
            ray.instead = silence
            with pytest.raises(NodeUnavailable, match="Timeout"):
                await ours.targets()
        async with RayDashboard(access, APPLICATION) as ours:
            with pytest.raises(NodeUnavailable, match="ClientConnectorError"):
                await ours.scale("decode", 2)

    asyncio.run(ask())


def test_whoever_waits_for_the_coordinator_hears_why_the_dashboard_is_silent():
    assert ray_dashboard.ANSWER_S < coordinator_call.ANSWER_S
