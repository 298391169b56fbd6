"""The gateway's channels to its nodes, in its event loop: messages down, events up."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from cluster.events import Event, NodeDrained, NodeFellSilent, NodeJoined, NodeLost, NodeSaid
from cluster.node_messages import read_from_node, send_to_node
from cluster.view import DRAINING, READY, Member, View
from decode.messages import AskReport
from kernels.transport.errors import ChannelClosed, ChannelError, ChannelTimeout
from kernels.transport.hello import connect_plain
from kernels.transport.stream import StreamChannel

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
NODE_KINDS = ("prefill", "decode")

# Reports asked for and not answered, of four a second: counted instead of seconds, so that a gateway which
# stood still itself thinks nobody silent. A node's own thread answers, however long its steps are.
SILENT_ASKS_COUNT = 12
LOST_ASKS_COUNT = 60


class NodeLinks:
    """One channel to each prefill and decode node; all methods belong to one event loop."""

    def __init__(self, name: str, secret: str, on_event: Callable[[Event], None]):
        self._name = name
        self._secret = secret
        self._on_event = on_event
        self._channels: dict[str, StreamChannel] = {}
        self._kinds: dict[str, str] = {}
        self._unanswered_counts: dict[str, int] = {}
        self._writing: set[str] = set()
        self._closed = False

    async def follow(self, view: View) -> None:
        """Connect to nodes that are new, and note those that drain."""
        members = [member for kind in NODE_KINDS for member in view.of_kind(kind)]
        for member in members:
            if member.name in self._channels and member.state == DRAINING:
                self._on_event(NodeDrained(member.name))
        new = [member for member in members if member.name not in self._channels and member.state == READY]
        await asyncio.gather(*map(self._join, new))

    def send(self, name: str, message: Any) -> None:
        """Send a message to a node; one that is gone is lost once all that it said has been read."""
        channel = self._channels.get(name)
        if channel is None:
            return
        try:
            send_to_node(channel, message)
        except ChannelError:  # not told at once: the sender may be in the midst of another event
            asyncio.get_running_loop().call_soon(self._readable, name, channel)
            return
        self._watch_pending(name, channel)

    def ask_reports(self) -> None:
        """Ask every node for its numbers; they come as events. Who leaves many unanswered is lost."""
        for name, channel in list(self._channels.items()):
            unanswered_count = self._unanswered_counts[name]
            if unanswered_count == LOST_ASKS_COUNT:
                self._lose(name, channel, ChannelTimeout(f"it left {unanswered_count} questions unanswered"))
                continue
            if unanswered_count == SILENT_ASKS_COUNT:
                self._on_event(NodeFellSilent(name))
            self._ask_report(name)

    def close(self) -> None:
        """Close all channels, and those that are being opened."""
        self._closed = True
        for name, channel in list(self._channels.items()):
            self._forget(name, channel)

    async def _join(self, member: Member) -> None:
        try:
            channel = await asyncio.to_thread(
                connect_plain, member.address, self._secret, self._name, CONNECT_TIMEOUT_S
            )
        except ChannelError as error:
            logger.info("%s cannot be reached yet: %s", member.name, error)
            return
        if self._closed or member.name in self._channels:
            channel.close()
            return
        channel.peer = member.name
        self._channels[member.name] = channel
        self._kinds[member.name] = member.kind
        self._unanswered_counts[member.name] = 0
        asyncio.get_running_loop().add_reader(channel.fileno(), self._readable, member.name, channel)
        self._on_event(NodeJoined(member.name, member.kind))
        self._ask_report(member.name)

    def _ask_report(self, name: str) -> None:
        self._unanswered_counts[name] += 1
        self.send(name, AskReport())

    def _readable(self, name: str, channel: StreamChannel) -> None:
        if self._channels.get(name) is not channel:
            return
        try:
            while (frame := channel.receive_ready()) is not None:
                self._unanswered_counts[name] = 0
                self._on_event(NodeSaid(name, read_from_node(self._kinds[name], frame)))
        except ChannelError as error:
            self._lose(name, channel, error)

    def _watch_pending(self, name: str, channel: StreamChannel) -> None:
        if channel.has_pending and name not in self._writing:
            self._writing.add(name)
            asyncio.get_running_loop().add_writer(channel.fileno(), self._writable, name, channel)

    def _writable(self, name: str, channel: StreamChannel) -> None:
        try:
            done = channel.push()
        except ChannelError:
            done = True  # its end shows when it is read
        if done:
            self._writing.discard(name)
            asyncio.get_running_loop().remove_writer(channel.fileno())

    def _lose(self, name: str, channel: StreamChannel, error: ChannelError) -> None:
        if self._channels.get(name) is not channel:
            return
        if not isinstance(error, ChannelClosed):
            logger.warning("lost %s: %s: %s", name, type(error).__name__, error)
        self._forget(name, channel)
        self._on_event(NodeLost(name))

    def _forget(self, name: str, channel: StreamChannel) -> None:
        del self._channels[name], self._kinds[name], self._unanswered_counts[name]
        self._writing.discard(name)
        loop = asyncio.get_running_loop()
        if channel.fileno() >= 0:
            loop.remove_reader(channel.fileno())
            loop.remove_writer(channel.fileno())
        channel.close()
