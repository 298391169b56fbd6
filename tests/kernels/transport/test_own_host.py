"""The address that others find this host at."""

import ipaddress
import socket

from kernels.transport import sockets
from kernels.transport.sockets import own_host


def test_it_is_an_address_of_this_host():
    host = own_host()
    assert ipaddress.ip_address(host).version == 4 and host != "0.0.0.0"
    with socket.socket() as sock:
        sock.bind((host, 0))  # refused for addresses of others


def test_without_a_way_out_it_is_this_host_alone(monkeypatch):
    class Cut:
        def __init__(self, *_: object) -> None:
            """A socket without a route."""

        def __enter__(self) -> "Cut":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing to close."""

        def connect(self, _: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(sockets.socket, "socket", Cut)
    assert own_host() == "127.0.0.1"
