"""Posts and the actors that hold them, without Ray: from loading to serving, to another role, to the end."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster import actors
from cluster import post as post_module
from cluster.actors import DecodeActor, NodeActor, PrefillActor
from cluster.config import DecodeSection, check_config
from cluster.heartbeat import Heartbeat
from cluster.place import Place
from cluster.post import Post
from cluster.view import DRAINING, HURRY_S, READY, STARTING, Member, View
from decode.messages import DOWN, CancelRequest, ReservePages, SamplingParameters
from decode.node import DecodeNode
from experts.messages import Placement, ShardAddress
from kernels.model.checkpoint import Checkpoint
from kernels.model.moe import NoExperts
from kernels.model.step_watch import StepsFail
from kernels.model.transformer import Transformer
from kernels.transport.connect import connect
from kernels.transport.endpoint import Endpoint
from prefill.node import PrefillNode
from tests.cluster.served import FOLDER, SECRET, until

PLACED = Placement(1, 1, (), ())


class Method:
    """A method of an actor, called as Ray calls it."""

    def __init__(self, answer: Callable):
        self.remote = answer


class Coordinator:
    """Remembers what members say, and tells them roles."""

    def __init__(self) -> None:
        self.heard: list[Member] = []
        self.left: list[str] = []
        self.roles: dict[str, str] = {}
        self.placement: Placement | None = None
        self.pace_s = HURRY_S
        self.heartbeat = Method(self._hear)
        self.leave = Method(self._leave)

    async def _hear(self, member: Member) -> View:
        self.heard.append(member)
        return View((member,), self.placement, self.placement, 0, dict(self.roles), pace_s=self.pace_s)

    async def _leave(self, name: str) -> None:
        self.left.append(name)

    def states(self, name: str) -> list[str]:
        """A member's states in order, each once."""
        return list(dict.fromkeys(member.state for member in self.heard if member.name == name))

    def last(self, name: str) -> Member:
        """As a member described itself last."""
        return next(member for member in reversed(self.heard) if member.name == name)


class Ended:
    """A post, or its tracing, that only ends."""

    def __init__(self, end: Callable[[], None], after_s: float = 0.0):
        self._end = end
        self._after_s = after_s

    async def close(self) -> None:
        """Do what was asked for at the end."""
        await asyncio.sleep(self._after_s)
        self._end()

    stop = close


class Prefill(PrefillActor):
    """Ended by hand, as Serve does, and not again with the garbage."""

    drain = NodeActor.__del__

    def __del__(self) -> None:
        """Nothing: see `drain`."""


class Decode(DecodeActor):
    """As above."""

    drain = NodeActor.__del__

    def __del__(self) -> None:
        """Nothing: see `drain`."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch) -> Iterator[None]:
    """No waiting for others to notice, no change of this process's logs; garbage is found again."""
    monkeypatch.setattr(post_module, "NOTICED_S", 0.0)
    monkeypatch.setattr(post_module, "DRAIN_POLL_S", 0.01)
    monkeypatch.setattr(actors, "begin_logs", lambda *_: None)
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    """The attention half of the example."""
    return Transformer.from_checkpoint(Checkpoint(FOLDER), torch.float32, NoExperts())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A cluster of this host alone."""
    return place_of(tmp_path)


def place_of(tmp_path: Path, **decode: object) -> Place:
    """With some settings of the decode pool."""
    nodes = {"latents_bytes": 8 << 20}
    values = {"model": {"folder": str(FOLDER)}, "prefill": nodes, "decode": nodes | decode}
    return Place(check_config(values, "test", Path.cwd()), SECRET, str(tmp_path))


def refuse(role: str) -> None:
    """No role is wanted in most tests."""
    raise AssertionError(f"asked to become a {role} node")


async def started(kind: type[NodeActor], place: Place, coordinator: Coordinator) -> NodeActor:
    """An actor that has loaded."""
    actor = kind.__new__(kind)
    await actor.__init__(place, coordinator)
    return actor


@asynccontextmanager
async def acting(kind: type, place: Place, coordinator: Coordinator) -> AsyncIterator[NodeActor]:
    """An actor until it is ended."""
    actor = await started(kind, place, coordinator)
    try:
        yield actor
    finally:
        await actor.drain()


@pytest.mark.parametrize(("kind", "made"), [("prefill", PrefillNode), ("decode", DecodeNode)])
def test_a_post_from_its_first_heartbeat_to_its_last(place, transformer, kind: str, made: type):
    async def run() -> None:
        coordinator = Coordinator()
        post = Post(kind, "decode", place, coordinator, refuse)
        await until(lambda: coordinator.heard)
        first = coordinator.last(post.name)
        assert (first.kind, first.pool, first.state) == (kind, "decode", STARTING)
        assert (first.address, first.report, first.loaded_share) == ("", None, 0.0)
        await asyncio.to_thread(post.open, transformer)
        assert type(post.node) is made and post.node.is_alive and not post.has_died
        assert post.node.spans is post.experts.spans
        await until(lambda: coordinator.last(post.name).state == READY)
        ready = coordinator.last(post.name)
        assert ready.address == post.node.endpoint.address and ready.report.kind == kind
        assert ready.loaded_share == 1.0 and ready.pid and ready.host
        await post.close()
        assert coordinator.states(post.name) == [STARTING, READY, DRAINING]
        assert coordinator.left == [post.name] and post.node is None and not post.has_died

    asyncio.run(run())


@pytest.mark.parametrize("make", [post_module.make_prefill, post_module.make_decode])
@pytest.mark.parametrize(("timeout_s", "step_s_max"), [(60.0, 240.0), (2.0, 120.0)])
def test_a_steps_time_goes_by_the_patience_of_its_dispatches_and_is_never_short(
    place, transformer, make: Callable, timeout_s: float, step_s_max: float
):
    experts = place.config.experts.model_copy(update={"dispatch_timeout_s": timeout_s})
    patient = replace(place, config=place.config.model_copy(update={"experts": experts}))
    node = make("name", patient, transformer)
    node.close()
    assert node.config.step_s_max == step_s_max


def test_one_that_never_opened_closes_too(place):
    async def run() -> None:
        coordinator = Coordinator()
        post = Post("decode", "decode", place, coordinator, refuse)
        await post.close()
        assert coordinator.left == [post.name] and coordinator.states(post.name) == [STARTING]

    asyncio.run(run())


def test_two_posts_share_the_weights_and_not_the_experts(place, transformer):
    async def run() -> None:
        coordinator = Coordinator()
        coordinator.placement = PLACED
        posts = [Post(kind, "decode", place, coordinator, refuse) for kind in ("prefill", "decode")]
        for post in posts:
            await asyncio.to_thread(post.open, transformer)
        await until(lambda: all(post.node.report().experts_epoch == 1 for post in posts))
        steps = posts[0].node.prefill_step, posts[1].node.decode_step
        used = [step.transformer for step in steps]
        assert [one.routed for one in used] == [post.experts for post in posts]
        assert len({one._embedding.data_ptr() for one in (*used, transformer)}) == 1
        await asyncio.gather(*(post.close() for post in posts))

    asyncio.run(run())


def test_a_node_that_goes_by_another_placement_says_so_at_once(place, transformer):
    async def run() -> None:
        coordinator = Coordinator()
        post = Post("decode", "decode", place, coordinator, refuse)
        await asyncio.to_thread(post.open, transformer)
        coordinator.pace_s = 30.0
        await until(lambda: post._heartbeat.view.pace_s == 30.0)
        coordinator.placement, count = PLACED, len(coordinator.heard)
        await post._heartbeat.announce()
        await until(lambda: coordinator.last(post.name).report.experts_epoch == PLACED.epoch)
        await asyncio.sleep(0.05)
        assert len(coordinator.heard) == count + 2
        await post.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("configured", "device", "layers", "expected"),
    [
        (None, "cpu", (1, 2), 1),
        (None, "cuda", (1, 2), 2),
        (None, "cuda", (), 1),
        (2, "cpu", (1, 2), 2),
        (1, "cuda", (1, 2), 1),
    ],
)
def test_a_step_is_split_where_something_would_be_idle(configured, device, layers, expected):
    model = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(moe_layers=layers))
    assert post_module.micro_batches(DecodeSection(micro_batches=configured), model) == expected


def test_a_role_is_asked_for_once_it_serves_and_only_where_it_is_another(place, transformer):
    async def run() -> None:
        coordinator, asked = Coordinator(), []
        post = Post("prefill", "prefill", place, coordinator, asked.append)
        coordinator.roles = {post.name: "decode", "another": "prefill"}
        await until(lambda: len(coordinator.heard) > 3)
        assert asked == [], "not before it serves"
        await asyncio.to_thread(post.open, transformer)
        await until(lambda: asked)
        assert set(asked) == {"decode"}
        coordinator.roles = {post.name: "prefill"}
        await until(lambda: post._heartbeat.view.roles == coordinator.roles)
        asked.clear()
        count = len(coordinator.heard)
        await until(lambda: len(coordinator.heard) > count + 3)
        assert asked == []
        await post.close()

    asyncio.run(run())


def test_closing_waits_for_the_requests_that_are_here(place, transformer):
    async def run() -> None:
        coordinator = Coordinator()
        post = Post("decode", "decode", place, coordinator, refuse)
        await asyncio.to_thread(post.open, transformer)
        gateway = await asyncio.to_thread(connect, post.node.endpoint.address, SECRET, "gateway")
        DOWN.send(gateway, ReservePages("r", 1, (5, 6, 7), 3, SamplingParameters()))
        await until(lambda: post.node.report().requests_waiting_count == 1)
        closing = asyncio.create_task(post.close())
        await until(lambda: DRAINING in coordinator.states(post.name))
        await asyncio.sleep(0.1)
        assert not closing.done() and post.node.is_alive and coordinator.left == []
        DOWN.send(gateway, CancelRequest("r", 1))
        await asyncio.wait_for(closing, 5)
        assert coordinator.left == [post.name]
        gateway.close()

    asyncio.run(run())


def test_a_node_that_died_is_seen_and_keeps_nobody_waiting(place, transformer):
    async def run() -> None:
        post = Post("decode", "decode", place, Coordinator(), refuse)
        await asyncio.to_thread(post.open, transformer)
        post.node._stopping = True
        await until(lambda: post.has_died)
        await asyncio.wait_for(post.close(), 10)

    asyncio.run(run())


def test_a_step_that_outlasts_its_node_is_told_of_once_all_else_has_ended(place, transformer, monkeypatch):
    async def run() -> None:
        post = Post("decode", "decode", place, Coordinator(), refuse)
        await asyncio.to_thread(post.open, transformer)
        node, blocked, freed = post.node, threading.Event(), threading.Event()
        node.config = replace(node.config, step_s_max=0.05)
        closed = []
        monkeypatch.setattr(post.experts, "close", lambda: closed.append("experts"))
        post._tracing = Ended(lambda: closed.append("tracing"))
        monkeypatch.setattr(node, "step", lambda: blocked.set() or int(not freed.wait(10)))
        await asyncio.to_thread(blocked.wait, 10)
        with pytest.raises(StepsFail):
            await post.close()
        assert closed == ["experts", "tracing"]
        freed.set()
        await asyncio.to_thread(node._thread.join, 10)

    asyncio.run(run())


def test_closing_does_not_wait_for_experts_that_do_not_answer(place, transformer, monkeypatch):
    came = threading.Event()
    mute = Endpoint("memory://mute", SECRET, "mute", lambda *_: came.set())
    mute.start()

    async def run() -> None:
        post = Post("decode", "decode", place, Coordinator(), refuse)
        post.experts.adopt(Placement(1, 1, (ShardAddress("mute", mute.address),), (((0,),),)))
        await asyncio.to_thread(post.open, transformer)
        tokens = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
        monkeypatch.setattr(post.node, "step", lambda: post.experts.dispatch(1, *tokens).combine())
        await asyncio.to_thread(came.wait, 10)
        begin_s = time.monotonic()
        await post.close()
        assert time.monotonic() - begin_s < 2.0

    asyncio.run(run())
    mute.close()


# actors


def test_an_actor_becomes_the_other_kind_with_the_weights_it_has_and_goes_home_again(place):
    async def run() -> None:
        coordinator = Coordinator()
        async with acting(Prefill, place, coordinator) as actor:
            weights = actor._transformer
            [first] = actor.posts
            assert (first.kind, first.pool) == ("prefill", "prefill")
            old_cache = weakref.ref(first.node.cache)
            coordinator.roles = {first.name: "decode"}
            await until(
                lambda: actor.posts and actor.posts[0].kind == "decode" and actor.posts[0].state == READY
            )
            [second] = actor.posts
            assert coordinator.states(first.name)[-2:] == [READY, DRAINING] and coordinator.left == [
                first.name
            ]
            assert actor._transformer is weights and second.name != first.name
            assert old_cache() is None, "the old node's latents are gone"
            await until(lambda: coordinator.last(second.name).state == READY)
            told = coordinator.last(second.name)
            assert (told.kind, told.pool) == ("decode", "prefill"), "it is lent"
            await actor.check_health()
            coordinator.roles = {second.name: "prefill"}
            await until(
                lambda: actor.posts and actor.posts[0].kind == "prefill" and actor.posts[0].state == READY
            )
            await actor.check_health()
            names = [first.name, second.name, actor.posts[0].name]
        assert coordinator.left == names

    asyncio.run(run())


def test_an_actor_that_serves_as_both_kinds_changes_no_role(tmp_path):
    async def run() -> None:
        coordinator = Coordinator()
        async with acting(Decode, place_of(tmp_path, reads_prompts=True), coordinator) as actor:
            before = list(actor.posts)
            assert [post.kind for post in before] == ["prefill", "decode"]
            assert {post.pool for post in before} == {"decode"}
            coordinator.roles = {before[0].name: "decode", before[1].name: "prefill"}
            count = len(coordinator.heard)
            await until(lambda: len(coordinator.heard) > count + 6)
            assert actor.posts == before and actor._changing is None
        assert sorted(coordinator.left) == sorted(post.name for post in before)

    asyncio.run(run())


def test_an_actor_tells_serve_of_a_node_that_died(place):
    async def run() -> None:
        async with acting(Decode, place, Coordinator()) as actor:
            await actor.check_health()
            actor.posts[0].node._stopping = True
            await until(lambda: actor.posts[0].has_died)
            with pytest.raises(RuntimeError, match=actor.posts[0].name):
                await actor.check_health()

    asyncio.run(run())


def test_an_actor_tells_serve_of_a_change_that_failed(place, monkeypatch):
    def broken(*_: object) -> None:
        raise MemoryError("no room for latents")

    async def run() -> None:
        coordinator = Coordinator()
        async with acting(Prefill, place, coordinator) as actor:
            monkeypatch.setattr(post_module, "make_decode", broken)
            coordinator.roles = {actor.posts[0].name: "decode"}
            await until(lambda: actor._changing is not None and actor._changing.done())
            with pytest.raises(MemoryError):
                await actor.check_health()

    asyncio.run(run())


def test_an_actor_that_is_ended_while_it_changes_ends_as_what_it_became(place):
    async def run() -> None:
        coordinator = Coordinator()
        actor = await started(Prefill, place, coordinator)
        [first] = actor.posts
        coordinator.roles = {first.name: "decode"}
        await until(lambda: actor._changing is not None)
        await actor.drain()
        assert len(coordinator.left) == 2 and coordinator.left[0] == first.name
        beating = [task for task in asyncio.all_tasks() if Heartbeat.__name__ in repr(task)]
        assert not beating

    asyncio.run(run())


def test_a_post_that_does_not_close_cuts_no_others_short():
    ended: list[str] = []

    def fail() -> None:
        raise StepsFail("its step goes on")

    async def run() -> None:
        actor = Decode.__new__(Decode)
        actor._changing = None
        actor.posts = [Ended(fail), Ended(lambda: ended.append("other"), after_s=0.05)]
        with pytest.raises(StepsFail):
            await actor.drain()
        assert ended == ["other"]

    asyncio.run(run())
