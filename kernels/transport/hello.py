"""The first frame of every channel, and channels that need nothing else: those over sockets alone."""

import hmac

from kernels.transport.errors import ChannelError, ConnectFailed, HelloRefused
from kernels.transport.frame import HELLO, Frame, FrameLimits
from kernels.transport.sockets import dial
from kernels.transport.stream import StreamChannel

PROTOCOL_VERSION = 1
HELLO_LIMITS = FrameLimits(header_bytes_max=4096, payload_bytes_max=0)
NAME_CHARACTERS_MAX = 128


def hello_of(secret: str, name: str) -> dict:
    """What a process called `name` says first."""
    return {"version": PROTOCOL_VERSION, "secret": secret, "name": name}


def check_hello(frame: Frame, secret: str) -> str:
    """The peer's name if its hello is valid; raises HelloRefused."""
    body = frame.body
    if frame.kind != HELLO or not isinstance(body, dict) or body.get("version") != PROTOCOL_VERSION:
        raise HelloRefused(f"the first frame is not a hello of protocol version {PROTOCOL_VERSION}")
    theirs, name = body.get("secret"), body.get("name")
    if not isinstance(theirs, str) or not hmac.compare_digest(theirs.encode(), secret.encode()):
        raise HelloRefused("the peer's secret is not that of this cluster; give every process the same one")
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isprintable():
        raise HelloRefused(f"the peer's name is not 1 to {NAME_CHARACTERS_MAX} printable characters")
    return name


def connect_plain(address: str, secret: str, name: str, timeout_s: float = 5.0) -> StreamChannel:
    """A channel to the listener at `address`, not one between GPUs, our hello sent; raises ConnectFailed."""
    channel = StreamChannel(dial(address, timeout_s))
    try:
        channel.send(HELLO, hello_of(secret, name))
    except ChannelError as error:
        channel.close()
        raise ConnectFailed(f"{address} went away before our hello") from error
    return channel
