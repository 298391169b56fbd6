"""Channels by their addresses, between GPUs too: how one connects, listens, and lets a peer in."""

import socket
from collections.abc import Callable

from kernels.transport.cuda_ipc import CudaIpcLink
from kernels.transport.device_channel import DeviceChannel
from kernels.transport.device_link import DeviceLink
from kernels.transport.errors import ChannelError, ConnectFailed, DeviceLinkFailed
from kernels.transport.frame import Frame, FrameLimits
from kernels.transport.hello import HELLO_LIMITS, check_hello, connect_plain, hello_of
from kernels.transport.nccl import NcclLink
from kernels.transport.sockets import Listener, bind, dial, is_between_devices, split
from kernels.transport.stream import StreamChannel

LINKS: dict[str, Callable[[], DeviceLink]] = {"nccl": NcclLink, "cuda-ipc": CudaIpcLink}
"""What joins the GPUs of both ends, for each scheme of device channels."""


def listen(address: str) -> Listener:
    """As `bind`; raises DeviceUnavailable for an address between GPUs where there is none."""
    link_for(address)  # better known now that there is no GPU than when the first peer comes
    return bind(address)


def connect(address: str, secret: str, name: str, timeout_s: float = 5.0) -> StreamChannel:
    """A channel to the listener at `address`, our hello sent; raises ConnectFailed, DeviceUnavailable."""
    if not is_between_devices(address):
        return connect_plain(address, secret, name, timeout_s)
    try:
        link = link_for(address)
        channel = channel_over(dial(address, timeout_s), link)
    except (OSError, RuntimeError) as error:
        if isinstance(error, ChannelError):
            raise
        raise ConnectFailed(f"no channel to {address} could be made here ({type(error).__name__})") from error
    try:
        channel.greet(hello_of(secret, name))
    except DeviceLinkFailed:  # our own GPU has nothing to offer
        channel.close()
        raise
    except ChannelError as error:
        channel.close()
        raise ConnectFailed(f"{address} went away before our hello") from error
    return channel


def accepted(sock: socket.socket, address: str) -> StreamChannel:
    """The channel of a peer that knocked at `address` and has yet to say hello; raises OSError."""
    try:
        return channel_over(sock, link_for(address), HELLO_LIMITS)
    except (OSError, RuntimeError) as error:
        sock.close()
        raise OSError(f"no channel at {address} could be made ({type(error).__name__})") from error


def welcome(channel: StreamChannel, hello: Frame, secret: str, limits: FrameLimits) -> None:
    """Let a peer in whose hello is valid, its GPU joined to ours where it has one; raises HelloRefused."""
    name = check_hello(hello, secret)
    channel.reader.limits = limits
    if isinstance(channel, DeviceChannel):
        channel.welcome(hello.body)
    channel.peer = name


def link_for(address: str) -> DeviceLink | None:
    """What is to join GPUs under a channel of this scheme; raises DeviceUnavailable, and errors of CUDA."""
    scheme, _ = split(address)
    return LINKS[scheme]() if scheme in LINKS else None


def channel_over(
    sock: socket.socket, link: DeviceLink | None, limits: FrameLimits | None = None
) -> StreamChannel:
    """A channel over a connected socket, which is closed where that fails; raises OSError."""
    if link is None:
        return StreamChannel(sock, limits)
    try:
        return DeviceChannel(sock, link, limits)
    except OSError:
        sock.close()
        raise
