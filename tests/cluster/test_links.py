"""The gateway's channels over real unix sockets: nodes that come, speak, drain, break and come back."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import links as links_module
from cluster.events import Event, NodeDrained, NodeFellSilent, NodeJoined, NodeLost, NodeSaid
from cluster.links import LOST_ASKS_COUNT, SILENT_ASKS_COUNT, NodeLinks
from cluster.view import DRAINING, STARTING, Member, View
from decode.messages import UP, AskReport, CancelRequest, NodeReport
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelClosed
from kernels.transport.frame import Frame
from kernels.transport.stream import StreamChannel

SECRET = "a secret of the tests"
TIMEOUT_S = 10.0


class Node:
    """A decode node that only talks."""

    def __init__(self, name: str, address: str):
        self.name = name
        self.frames: list[Frame] = []
        self.peers: list[StreamChannel] = []
        self.endpoint = Endpoint(address, SECRET, name, self.on_frame)
        self.endpoint.start()

    def on_frame(self, channel: StreamChannel, frame: Frame) -> None:
        """Keep what comes and who sent it."""
        if channel not in self.peers:
            self.peers.append(channel)
        self.frames.append(frame)

    def member(self, **values) -> Member:
        """The node as the coordinator shows it."""
        return Member(self.name, "decode", self.endpoint.address, **values)

    def report(self, tokens_count: int = 0) -> None:
        """Tell every gateway its numbers."""
        report = NodeReport(
            self.name, "decode", self.endpoint.address, 0, 0, 0, 9, 9, 0, 0, tokens_count, 0, 1, 0
        )
        for channel in self.peers:
            UP.send(channel, report)


class Gateway:
    """Links, and what they have told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.links = NodeLinks("gateway", SECRET, self.events.append)

    async def until(self, true: Callable[[], bool]) -> None:
        """Let the loop run until something is true."""
        async with asyncio.timeout(TIMEOUT_S):
            while not true():
                await asyncio.sleep(0.005)

    async def joined(self, node: Node) -> None:
        """Follow a view of one node until it has been heard of."""
        await self.links.follow(View((node.member(),)))
        await self.until(lambda: node.frames)

    def of(self, kind: type) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    """Starts nodes by name."""
    nodes = []

    def start(name: str, path: str = "") -> Node:
        nodes.append(Node(name, f"unix://{tmp_path}/{path or name}"))
        return nodes[-1]

    yield start
    for node in nodes:
        node.endpoint.close()


def test_a_node_joins_is_asked_and_speaks(start):
    node = start("d")

    async def run() -> None:
        gateway = Gateway()
        await gateway.joined(node)
        assert gateway.events == [NodeJoined("d", "decode")]
        node.report(7)
        await gateway.until(lambda: gateway.of(NodeSaid))
        assert gateway.of(NodeSaid)[0].message.tokens_count == 7
        await gateway.links.follow(View((node.member(),)))
        await gateway.links.follow(View())
        assert len(gateway.of(NodeJoined)) == 1
        assert gateway.of(NodeLost) == [], "a view without a node loses nobody"
        gateway.links.close()
        gateway.links.send("d", AskReport())

    asyncio.run(run())


def test_a_node_that_drains_is_told_and_one_that_starts_is_not_joined(start):
    node = start("d")

    async def run() -> None:
        gateway = Gateway()
        await gateway.links.follow(View((node.member(state=STARTING),)))
        await gateway.links.follow(View((node.member(state=DRAINING),)))
        assert gateway.events == []
        await gateway.joined(node)
        await gateway.links.follow(View((node.member(state=DRAINING),)))
        assert gateway.of(NodeDrained) == [NodeDrained("d")]
        gateway.links.close()

    asyncio.run(run())


def test_a_closed_channel_loses_the_node_once_and_it_may_come_back(start):
    node = start("d")

    async def run() -> None:
        gateway = Gateway()
        await gateway.joined(node)
        node.peers[0].close()
        await gateway.until(lambda: gateway.of(NodeLost))
        await gateway.links.follow(View((node.member(),)))
        await gateway.until(lambda: len(node.peers) == 2)
        node.peers[1].send("what", None)
        await gateway.until(lambda: len(gateway.of(NodeLost)) == 2)
        gateway.links.close()

    asyncio.run(run())


def test_a_node_that_answers_nothing_falls_silent_and_is_lost(start):
    node = start("d")

    async def run() -> None:
        gateway = Gateway()
        await gateway.joined(node)
        for heard_count in (1, 2):
            for _ in range(SILENT_ASKS_COUNT):
                gateway.links.ask_reports()
            node.report()
            await gateway.until(lambda heard_count=heard_count: len(gateway.of(NodeSaid)) == heard_count)
        assert gateway.of(NodeFellSilent) == [NodeFellSilent("d")], "the first time it spoke just in time"
        for _ in range(LOST_ASKS_COUNT):
            gateway.links.ask_reports()
        assert gateway.of(NodeLost) == []
        gateway.links.ask_reports()
        assert gateway.of(NodeLost) == [NodeLost("d")]
        await gateway.links.follow(View((node.member(),)))
        assert len(gateway.of(NodeJoined)) == 2, "it may come back"
        gateway.links.close()

    asyncio.run(run())


def test_a_node_that_restarts_under_a_new_name_at_the_same_address(start):
    first = start("d1", "same")

    async def run() -> None:
        gateway = Gateway()
        await gateway.joined(first)
        first.endpoint.close()
        await gateway.until(lambda: gateway.of(NodeLost))
        second = start("d2", "same")
        await gateway.joined(second)
        second.report()
        await gateway.until(lambda: gateway.of(NodeSaid))
        assert [event.name for event in gateway.of(NodeJoined)] == ["d1", "d2"]
        assert gateway.of(NodeSaid)[0].name == "d2"
        gateway.links.close()

    asyncio.run(run())


def test_an_address_where_nobody_listens_is_tried_again(start, tmp_path):
    async def run() -> None:
        gateway = Gateway()
        await gateway.links.follow(View((Member("d", "decode", f"unix://{tmp_path}/d"),)))
        assert gateway.events == []
        await gateway.joined(start("d"))
        gateway.links.close()

    asyncio.run(run())


def test_what_a_node_said_before_it_went_is_heard_although_a_send_fails(start):
    node = start("d")

    async def run() -> None:
        gateway = Gateway()
        await gateway.joined(node)
        node.report(42)
        node.endpoint.close()
        gateway.links.send("d", CancelRequest("r", 1))  # before the loop has read anything
        await gateway.until(lambda: gateway.of(NodeLost))
        kinds = [type(event) for event in gateway.events]
        assert kinds == [NodeJoined, NodeSaid, NodeLost]

    asyncio.run(run())


def test_a_slow_node_gets_everything_and_a_sender_never_waits(start):
    node = start("d")
    gate = threading.Event()
    on_frame = node.on_frame

    def slow(channel: StreamChannel, frame: Frame) -> None:
        gate.wait(TIMEOUT_S)
        on_frame(channel, frame)

    async def run() -> None:
        gateway = Gateway()
        await gateway.joined(node)
        node.endpoint._on_frame = slow
        long_id = "r" * 60_000
        for generation in range(400):
            gateway.links.send("d", CancelRequest(long_id, generation))
        gate.set()
        await gateway.until(lambda: len(node.frames) == 401)
        assert gateway.links._writing == set()
        gateway.links.close()

    asyncio.run(run())


def test_two_views_at_once_open_one_channel(start, monkeypatch):
    node = start("d")

    async def run() -> None:
        gateway = Gateway()
        view = View((node.member(),))
        await asyncio.gather(gateway.links.follow(view), gateway.links.follow(view))
        assert len(gateway.of(NodeJoined)) == 1
        gateway.links.close()

    asyncio.run(run())


def test_links_closed_while_a_channel_is_opened(start, monkeypatch):
    node = start("d")
    opened = []
    connect = links_module.connect_plain

    def slow_connect(*arguments):
        gate.wait(TIMEOUT_S)
        opened.append(connect(*arguments))
        return opened[0]

    gate = threading.Event()
    monkeypatch.setattr(links_module, "connect_plain", slow_connect)

    async def run() -> None:
        gateway = Gateway()
        following = asyncio.create_task(gateway.links.follow(View((node.member(),))))
        await asyncio.sleep(0)
        gateway.links.close()
        gate.set()
        await following
        assert gateway.events == []
        with pytest.raises(ChannelClosed):
            opened[0].push()

    asyncio.run(run())
