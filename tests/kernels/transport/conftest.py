"""One address of each scheme, the two ends of a channel, and endpoints that keep what comes."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernels.transport.connect import connect, listen
from kernels.transport.endpoint import Endpoint
from kernels.transport.frame import Frame
from kernels.transport.hello import check_hello
from kernels.transport.sockets import Listener, dial
from kernels.transport.stream import StreamChannel

SECRET = "a secret of the tests"
WAIT_S = 20.0
TURN_S = 0.02
TURNS_MAX = 1000


@pytest.fixture(params=["memory", "unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Somewhere to listen, once for each scheme."""
    free = {
        "memory": f"memory://{uuid.uuid4().hex}",
        "unix": f"unix://{tmp_path}/s",
        "tcp": "tcp://127.0.0.1:0",
    }
    return free[request.param]


@pytest.fixture
def listener(address: str) -> Iterator[Listener]:
    """A listener at `address`."""
    with contextlib.closing(listen(address)) as listening:
        yield listening


@dataclass
class Pair:
    """Both ends of one channel; `there` accepted it."""

    here: StreamChannel
    there: StreamChannel


def accept(listener: Listener) -> StreamChannel:
    """The channel of a peer that has connected already."""
    sock = listener.accept()
    assert sock is not None
    return StreamChannel(sock)


@pytest.fixture
def pair(listener: Listener) -> Iterator[Pair]:
    """Two ends of a channel, the hello behind them, held by no endpoint."""
    here = connect(listener.address, SECRET, "here")
    there = accept(listener)
    there.peer = check_hello(there.receive(WAIT_S), SECRET)
    yield Pair(here, there)
    here.close()
    there.close()


@pytest.fixture
def stranger(listener: Listener) -> Iterator[tuple]:
    """A bare socket, and the channel that it talks to."""
    sock = dial(listener.address, WAIT_S)
    channel = accept(listener)
    yield sock, channel
    sock.close()
    channel.close()


class Peer:
    """An endpoint that keeps its frames and the channels that ended, and is polled by the test."""

    def __init__(self, address: str, name: str = "peer", **options):
        self.frames: list[tuple[StreamChannel, Frame]] = []
        self.closed: list[StreamChannel] = []
        options = {"on_frame": self._keep, "on_closed": self.closed.append, "secret": SECRET, **options}
        self.endpoint = Endpoint(address, name=name, **options)

    @property
    def address(self) -> str:
        return self.endpoint.address

    @property
    def counts(self):
        return self.endpoint.counts

    def _keep(self, channel: StreamChannel, frame: Frame) -> None:
        self.frames.append((channel, frame))

    def poll_until(self, happened: Callable[[], object]) -> None:
        """Poll until something has happened; fails where it never does."""
        for _ in range(TURNS_MAX):
            if happened():
                return
            self.endpoint.poll(TURN_S)
        raise AssertionError(f"nothing came of {TURNS_MAX} turns")


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    """Makes peers that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(address: str, **options) -> Peer:
            peer = Peer(address, **options)
            stack.callback(peer.endpoint.close)
            return peer

        yield make


@pytest.fixture
def make_channel() -> Iterator[Callable[..., StreamChannel]]:
    """Connects channels that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(address: str, secret: str = SECRET, name: str = "guest") -> StreamChannel:
            channel = connect(address, secret, name)
            stack.callback(channel.close)
            return channel

        yield make
