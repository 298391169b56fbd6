"""Addresses: how they are read, who may listen, and what is left behind."""

import os
import socket
import stat

import pytest

from kernels.transport.connect import connect, listen
from kernels.transport.errors import AddressInvalid, ConnectFailed, HelloRefused, ListenFailed
from kernels.transport.frame import Frame
from kernels.transport.hello import PROTOCOL_VERSION, check_hello
from kernels.transport.sockets import refuse_oneself, split, split_host
from tests.kernels.transport.conftest import SECRET, WAIT_S, accept


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://10.0.0.1:80", ("tcp", "10.0.0.1:80")),
        ("unix:///run/a.sock", ("unix", "/run/a.sock")),
        ("memory://a b://c", ("memory", "a b://c")),
    ],
)
def test_addresses_are_split(address, parts):
    assert split(address) == parts


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp",
        "tcp:/x:1",
        "tcp://",
        "unix://",
        "memory://",
        "http://x:1",
        "TCP://x:1",
        "://x",
        "/run/a",
        "unix://a\0b",
    ],
)
def test_what_is_no_address_says_how_to_write_one(address):
    for use in (listen, lambda address: connect(address, SECRET, "me")):
        with pytest.raises(AddressInvalid, match="use tcp://host:port"):
            use(address)


@pytest.mark.parametrize(
    ("rest", "parts"),
    [
        ("host:1", ("host", 1)),
        ("[::1]:65535", ("::1", 65_535)),
        ("::1:0", ("::1", 0)),
        ("1.2.3.4:080", ("1.2.3.4", 80)),
    ],
)
def test_hosts_and_ports_are_split(rest, parts):
    assert split_host(rest) == parts


@pytest.mark.parametrize(
    "rest",
    [
        "host",
        "host:",
        ":80",
        "host:x",
        "host:-1",
        "host:65536",
        "host:²",
        "host:1.5",
        "[]:80",
        "host: 80",
        "h:000001",
    ],
)
def test_what_is_no_host_and_port_is_refused(rest):
    with pytest.raises(AddressInvalid):
        connect(f"tcp://{rest}", SECRET, "me")


def test_connecting_to_nobody_fails(address, listener):
    listener.close()
    with pytest.raises(ConnectFailed, match="nobody"):
        connect(listener.address, SECRET, "me")


@pytest.mark.parametrize(
    "address", ["unix:///no/such/folder/s", "unix:///" + "x" * 200, "tcp://" + "x" * 70 + ":1"]
)
def test_connecting_to_what_cannot_be_fails(address):
    with pytest.raises(ConnectFailed):
        connect(address, SECRET, "me")


@pytest.mark.parametrize("address", ["unix:///no/such/folder/s", "unix:///" + "x" * 200, "tcp://192.0.2.1:0"])
def test_listening_where_one_cannot_fails(address):
    with pytest.raises(ListenFailed):
        listen(address)


def test_a_socket_joined_to_itself_is_nobody():
    itself = socket.socket()
    itself.bind(("127.0.0.1", 0))
    itself.connect(itself.getsockname())  # the kernel allows it
    with pytest.raises(ConnectionRefusedError):
        refuse_oneself(itself)
    assert itself.fileno() == -1


def test_a_free_port_is_named_in_the_address(make_channel):
    listener = listen("tcp://127.0.0.1:0")
    assert listener.address.startswith("tcp://127.0.0.1:")
    assert split_host(split(listener.address)[1])[1] > 0
    make_channel(listener.address)
    accept(listener).close()
    listener.close()


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_ipv6_hosts_stand_in_brackets(make_channel):
    try:
        listener = listen("tcp://[::1]:0")
    except ListenFailed:
        pytest.skip("no IPv6 loopback here")
    assert listener.address.startswith("tcp://[::1]:")
    make_channel(listener.address)
    accept(listener).close()
    listener.close()


def test_two_cannot_listen_at_one_address(address, listener):
    with pytest.raises(ListenFailed):
        listen(listener.address)
    connect(listener.address, SECRET, "me").close()  # the first is not harmed


def test_an_address_is_free_again_once_closed(address, listener):
    listener.close()
    listener.close()
    again = listen(address)
    again.close()


def test_closing_a_second_time_leaves_the_next_listener_alone(address, listener, make_channel):
    listener.close()
    again = listen(listener.address)
    listener.close()
    make_channel(again.address)
    accept(again).close()
    again.close()


def test_who_waits_is_turned_away_when_the_listener_closes(listener):
    channel = connect(listener.address, SECRET, "me")
    listener.close()
    with pytest.raises(ConnectionError):
        channel.receive(WAIT_S)
    channel.close()


def test_a_stale_unix_socket_is_replaced(tmp_path, make_channel):
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    listener = listen(f"unix://{path}")
    make_channel(listener.address)
    accept(listener).close()
    listener.close()
    assert not path.exists()


def test_a_regular_file_is_never_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("kept")
    with pytest.raises(ListenFailed, match="not a socket"):
        listen(f"unix://{path}")
    assert path.read_text() == "kept"


def test_a_link_to_a_socket_is_never_removed(tmp_path):
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "s"))
    dead.close()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "s")
    with pytest.raises(ListenFailed, match="not a socket"):
        listen(f"unix://{link}")
    assert link.is_symlink()
    assert (tmp_path / "s").is_socket()


def test_a_unix_socket_is_open_to_its_user_alone(tmp_path):
    path = tmp_path / "s"
    listener = listen(f"unix://{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()


def hello(**changes) -> Frame:
    body = {"version": PROTOCOL_VERSION, "secret": SECRET, "name": "node-1", **changes}
    return Frame("hello", {key: value for key, value in body.items() if value is not None}, [])


def test_a_hello_gives_the_name():
    assert check_hello(hello(), SECRET) == "node-1"


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (Frame("Other", hello().body, []), "not a hello"),
        (Frame("hello", [], []), "not a hello"),
        (hello(version=2), "not a hello"),
        (hello(version=None), "not a hello"),
        (hello(secret=None), "secret"),
        (hello(secret=""), "secret"),
        (hello(secret=SECRET + "x"), "secret"),
        (hello(secret=SECRET.encode()), "secret"),
        (hello(secret="é"), "secret"),
        (hello(name=None), "name"),
        (hello(name=""), "name"),
        (hello(name="n" * 129), "name"),
        (hello(name="two\nlines"), "name"),
        (hello(name=7), "name"),
    ],
)
def test_another_hello_is_refused(frame, said):
    with pytest.raises(HelloRefused, match=said) as caught:
        check_hello(frame, SECRET)
    assert SECRET not in str(caught.value)


def test_a_hundred_channels_leave_no_descriptor_behind(listener):
    def round_trip() -> None:
        channel = connect(listener.address, SECRET, "me")
        accept(listener).close()
        channel.close()
        with pytest.raises(ConnectFailed):
            connect("memory://nobody", SECRET, "me")
        with pytest.raises(ConnectFailed):
            connect("unix:///no/such/folder/s", SECRET, "me")

    round_trip()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        round_trip()
    assert len(os.listdir("/proc/self/fd")) == before
