"""A node's process that serves as the other kind: same tokens, no request harmed."""

import asyncio
from pathlib import Path

from cluster import pools
from cluster.client import Client
from cluster.validation import RequestedGeneration
from cluster.view import READY
from tests.end_to_end.stage import GREEDY_64, all_tokens, tokens_of, wait_until

SMALL = Path("examples/trivium-small")
REQUESTS = [RequestedGeneration(token_ids=(7, 8, 9, number), sampling=GREEDY_64) for number in range(12)]


def ready_names(kind: str) -> set[str]:
    return {member.name for member in pools.view().of_kind(kind) if member.state == READY}


def test_a_role_changes_there_and_back_under_load(stage):
    address = stage.cluster(SMALL, prefill={"count": 2})
    expected = all_tokens(address, REQUESTS)
    pids = {member.pid for member in stage.view.of_kind("prefill")}

    async def loaded(until) -> list[list[int]]:
        """Tokens of requests that are sent over and over while a role changes."""
        tokens = []
        async with Client(address) as client:
            while not await asyncio.to_thread(until):
                tokens += await asyncio.gather(*(tokens_of(client, request) for request in REQUESTS))
        return tokens

    for kinds, wanted in ((("prefill", "decode"), (1, 2)), (("decode", "prefill"), (2, 1))):
        asked = pools.coordinator_handle().lend.remote(*kinds).result(timeout_s=5)
        assert asked is not None
        got = asyncio.run(
            loaded(lambda wanted=wanted: (len(ready_names("prefill")), len(ready_names("decode"))) == wanted)
        )
        assert got and all(got[start : start + 12] == expected for start in range(0, len(got), 12))
        assert wait_until(lambda asked=asked: all(asked != one.name for one in pools.view().members), 10)
    assert {member.pid for member in pools.view().of_kind("prefill")} == pids, "who was lent went home"
    assert all_tokens(address, REQUESTS) == expected
