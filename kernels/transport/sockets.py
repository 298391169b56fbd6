"""Addresses with a scheme, and sockets for them: `tcp://host:port`, `unix:///path`, `memory://name`.

Between GPUs `nccl://host:port`, and `cuda-ipc:///path` between processes that use the same one.
"""

import os
import socket
import stat
import threading
from collections import deque
from pathlib import Path
from typing import Protocol

from kernels.transport.errors import AddressInvalid, ChannelError, ConnectFailed, ListenFailed

BACKLOG = 1024  # a full one refuses unix peers at once, and a shard that computes accepts nobody meanwhile
LOCAL_BUFFER_BYTES = 4 << 20
KEEPALIVE_S = 10
SILENT_HOST_S = 60

UNDER = {"nccl": "tcp", "cuda-ipc": "unix"}
"""The scheme of the socket under a channel between GPUs."""


def own_host() -> str:
    """Address of this host on the way to others; no packet is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # an address of nobody (RFC 5737): routed like any far one
        except OSError:
            return "127.0.0.1"
        return sock.getsockname()[0]


class Listener(Protocol):
    """A place where peers knock; `address` is what they connect to."""

    address: str

    def accept(self) -> socket.socket | None:
        """The next peer's socket, or None when none waits; raises OSError without a free descriptor."""

    def fileno(self) -> int:
        """Descriptor to wait on for peers."""

    def close(self) -> None:
        """Stop listening."""


class SocketListener:
    """Listens on a TCP port or a unix path."""

    def __init__(self, sock: socket.socket, address: str, path: Path | None = None):
        sock.listen(BACKLOG)
        sock.setblocking(False)
        self.address = address
        self._sock = sock
        self._path = path

    def accept(self) -> socket.socket | None:
        """The next peer's socket, or None when none waits; raises OSError without a free descriptor."""
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return None
            except ConnectionAbortedError:
                continue  # left while it waited; another may wait behind it
            return prepare(sock)

    def fileno(self) -> int:
        """Descriptor of the listening socket."""
        return self._sock.fileno()

    def close(self) -> None:
        """Stop listening and remove the unix path; safe to call twice."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)  # while it is surely ours: once closed, another may replace it
            self._path = None
        self._sock.close()


class MemoryListener:
    """Listens under a name within this process; its peers are socket pairs."""

    _by_name: dict[str, "MemoryListener"] = {}  # noqa: RUF012  the registry is the point
    _registry = threading.Lock()

    def __init__(self, name: str):
        self.address = f"memory://{name}"
        self._name = name
        self._waiting: deque[socket.socket] = deque()
        with self._registry:
            if name in self._by_name:
                raise ListenFailed(f"{self.address} is taken in this process; close who listens there first")
            self._bell_rope, self._bell = socket.socketpair()
            self._bell_rope.setblocking(False)
            self._bell.setblocking(False)
            self._by_name[name] = self

    @classmethod
    def knock(cls, name: str) -> socket.socket:
        """A socket whose other end the listener called `name` will accept; raises ConnectFailed."""
        with cls._registry:
            listener = cls._by_name.get(name)
            if listener is None:
                raise ConnectFailed(f"nobody listens at memory://{name} in this process")
            here, there = socket.socketpair()
            listener._waiting.append(there)
            try:
                listener._bell_rope.send(b"1")
            except BlockingIOError:
                pass  # it rings already
        return here

    def accept(self) -> socket.socket | None:
        """The next peer's socket, or None when none waits."""
        try:
            self._bell.recv(1)
        except BlockingIOError:
            pass
        return prepare(self._waiting.popleft()) if self._waiting else None

    def fileno(self) -> int:
        """Descriptor that becomes readable when somebody knocks."""
        return self._bell.fileno()

    def close(self) -> None:
        """Free the name and turn away who still waits; safe to call twice."""
        with self._registry:
            if self._by_name.get(self._name) is self:
                del self._by_name[self._name]
            while self._waiting:
                self._waiting.popleft().close()
            self._bell_rope.close()
            self._bell.close()


def is_between_devices(address: str) -> bool:
    """Whether a channel to this address carries tensors of a GPU."""
    return split(address)[0] in UNDER


def bind(address: str) -> Listener:
    """Listen at an address; port 0 takes a free one, a stale unix path is replaced; raises ListenFailed."""
    scheme, rest = split(address)
    if scheme == "memory":
        return MemoryListener(rest)
    on_path = UNDER.get(scheme, scheme) == "unix"
    sock = socket.socket(socket.AF_UNIX if on_path else family_of(rest))
    try:
        if on_path:
            bind_unix(sock, Path(rest))
            return SocketListener(sock, address, Path(rest))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(split_host(rest))
        return SocketListener(sock, f"{scheme}://{rest.rpartition(':')[0]}:{sock.getsockname()[1]}")
    except (OSError, UnicodeError) as error:
        sock.close()
        if isinstance(error, ChannelError):
            raise
        raise ListenFailed(f"cannot listen at {address}: {reason(error)}") from error


def dial(address: str, timeout_s: float) -> socket.socket:
    """A socket connected to `address`; raises ConnectFailed, AddressInvalid."""
    scheme, rest = split(address)
    try:
        if scheme == "memory":
            return prepare(MemoryListener.knock(rest))
        if UNDER.get(scheme, scheme) == "unix":
            return prepare(dial_unix(rest, timeout_s))
        return prepare(refuse_oneself(socket.create_connection(split_host(rest), timeout_s)))
    except (OSError, UnicodeError) as error:
        if isinstance(error, ChannelError):
            raise
        raise ConnectFailed(f"nobody answers at {address}: {reason(error)}") from error


def dial_unix(path: str, timeout_s: float) -> socket.socket:
    """A socket connected to a unix path; raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout_s)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def refuse_oneself(sock: socket.socket) -> socket.socket:
    """The socket itself, unless the kernel joined it to its own port, as it may where nobody listens."""
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise ConnectionRefusedError("only we ourselves")
    return sock


def prepare(sock: socket.socket) -> socket.socket:
    """Set a connected socket up for small frames at once, large ones in few pieces, and hosts that vanish."""
    try:
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # room for a whole layer of latents
                sock.setsockopt(socket.SOL_SOCKET, option, LOCAL_BUFFER_BYTES)
        else:  # the kernel sizes buffers of TCP by itself, and better, unless told
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_HOST_S * 1000)
    except OSError:
        pass  # it has gone already, as the first read will tell
    return sock


def split(address: str) -> tuple[str, str]:
    """Scheme and rest of an address; raises AddressInvalid for an unknown scheme."""
    scheme, found, rest = address.partition("://")
    if not found or scheme not in ("tcp", "unix", "memory", *UNDER) or not rest or "\0" in rest:
        raise AddressInvalid(
            f"{address!r} is no address: use tcp://host:port, unix:///path or memory://name, "
            "and between GPUs nccl://host:port or cuda-ipc:///path"
        )
    return scheme, rest


def split_host(rest: str) -> tuple[str, int]:
    """Host and port of `host:port`, brackets around an IPv6 host removed; raises AddressInvalid."""
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) > 65_535:
        raise AddressInvalid(f"{rest!r} is not host:port with a port of 0 to 65535")
    return host, int(port)


def family_of(rest: str) -> socket.AddressFamily:
    """IPv6 where the host of `host:port` is written in its way, else IPv4."""
    return socket.AF_INET6 if ":" in split_host(rest)[0] else socket.AF_INET


def bind_unix(sock: socket.socket, path: Path) -> None:
    """Bind to `path`, open to this user alone; only a socket that nobody listens at is ever removed."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISSOCK(mode):
            raise ListenFailed(f"unix://{path} exists and is not a socket; name another path")
        if is_live(path):
            raise ListenFailed(f"somebody listens at unix://{path} already; name another path")
        path.unlink()
    sock.bind(str(path))
    os.chmod(path, 0o600)  # in time: nobody can connect before it listens


def is_live(path: Path) -> bool:
    """Whether a process still listens at a unix path."""
    try:
        dial_unix(str(path), 0.0).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # too many wait there already, or it is not ours to ask
    return True


def reason(error: Exception) -> str:
    """What went wrong, in the system's words."""
    return getattr(error, "strerror", None) or str(error)
