"""Parcels leave in order, wait for nobody who does not read, and are not sent for those who have gone."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

import prefill.outbox
from decode.messages import FirstToken, Latents, SamplingParameters, checksum
from kernels.model.host_copies import HostCopy
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import ChannelClosed, ConnectFailed
from kernels.transport.tensors import as_bytes
from prefill.messages import PrefillPrompt
from prefill.outbox import Outbox, Parcel
from prefill.request import PrefillRequest


class Wire:
    """A channel that keeps what it is given, and takes nothing away while it is stalled."""

    carries_tensors = False

    def __init__(self):
        self.sent: list[tuple[str, dict, list[bytes]]] = []
        self.stalled = False
        self.joined_s = 0.0
        self.pending_bytes = 0
        self.ended = False
        self.closed = False

    def send(self, kind, body, parts=()):
        if self.ended or self.closed:
            raise ChannelClosed("closed")
        self.sent.append((kind, body, [bytes(part) for part in parts]))
        if self.stalled:
            self.pending_bytes += sum(len(part) for part in parts)

    def fileno(self):
        return -1 if self.closed else 3

    def end(self):
        self.ended = True
        self.pending_bytes = 0

    def close(self):
        self.end()
        self.closed = True


class Wires:
    """An endpoint that connects to anything but what is unreachable."""

    name = "prefill-0"

    def __init__(self):
        self.made: list[tuple[str, Wire]] = []
        self.unreachable: set[str] = set()

    def connect(self, address, timeout_s):
        if address in self.unreachable:
            raise ConnectFailed(f"nobody answers at {address}")
        self.made.append((address, Wire()))
        return self.made[-1][1]


@pytest.fixture
def wires():
    return Wires()


@pytest.fixture
def failed():
    return []


@pytest.fixture
def outbox(wires, failed):
    return Outbox(wires, failed.append)


def request(name="r", address="memory://d") -> PrefillRequest:
    asked = PrefillPrompt(name, 4, (1,) * 100, 100, SamplingParameters(), address)
    return PrefillRequest(asked, None, 0.0)


def parcel(of: PrefillRequest, layer=0, tokens=3) -> Parcel:
    return Parcel(of, layer, 64, 64 + tokens, HostCopy(torch.randn(tokens, 4)))


def test_latents_go_out_with_all_that_the_fence_asks_for_and_the_first_token_last(outbox, wires):
    sent = parcel(request(), layer=2)
    outbox.put(sent)
    outbox.put(Parcel(sent.request, 0, 0, 0, None, 17))
    ((_, wire),) = wires.made
    data = as_bytes(sent.latents.tensor)
    (kind, body, parts), last = wire.sent
    assert (kind, Latents(**body)) == ("Latents", Latents("r", 4, 2, 64, 67, "float32", checksum([data])))
    assert parts == [bytes(data)]
    assert (last[0], FirstToken(**last[1]), last[2]) == ("FirstToken", FirstToken("r", 4, 17), [])


def test_one_channel_serves_all_requests_of_an_address(outbox, wires):
    for address in ("memory://d", "memory://e", "memory://d"):
        outbox.put(parcel(request(address=address)))
    assert [address for address, _ in wires.made] == ["memory://d", "memory://e"]


def test_a_dropped_requests_parcels_stay_here(outbox, wires):
    gone, here = request("gone"), request("here")
    gone.is_dropped = True
    outbox.put(parcel(gone))
    outbox.put(parcel(here))
    assert [body["request_id"] for _, body, _ in wires.made[0][1].sent] == ["here"]


def test_nobody_there_fails_the_request(outbox, wires, failed):
    wires.unreachable.add("memory://d")
    lost = request()
    outbox.put(parcel(lost))
    assert failed == [lost]


def test_a_closed_channel_fails_its_request_and_is_replaced(outbox, wires, failed):
    outbox.put(parcel(request("a")))
    wires.made[0][1].closed = True
    outbox.put(parcel(request("b")))
    assert len(wires.made) == 2, "a channel that is gone was used again"
    wires.made[1][1].send = lambda *_: (_ for _ in ()).throw(ChannelClosed("gone"))
    lost = request("c")
    outbox.put(parcel(lost))
    assert failed == [lost]


def test_a_channel_is_forgotten_by_the_address_it_led_to(outbox, wires):
    outbox.put(parcel(request()))
    channel = wires.made[0][1]
    assert outbox.forget(Wire()) == []
    assert outbox.forget(channel) == ["memory://d"]
    assert outbox.forget(channel) == []
    assert outbox._lines == {}, "decode nodes that have gone are kept for ever"
    outbox.put(parcel(request()))
    assert len(wires.made) == 2


@pytest.fixture
def clock(monkeypatch):
    """Seconds of the outbox, which pass only where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(prefill.outbox, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def names(wire: Wire) -> list[str]:
    return [body["request_id"] for _, body, _ in wire.sent]


def test_a_decode_node_that_falls_behind_is_waited_for_but_not_without_end(
    outbox, wires, failed, monkeypatch, clock
):
    monkeypatch.setattr(prefill.outbox, "UNSENT_BYTES_MAX", 100)
    requests = [request(str(number)) for number in range(5)]
    outbox.put(parcel(requests[0]))
    ((_, wire),) = wires.made
    for _ in range(3):
        outbox.put(parcel(requests[0]))
    assert len(wire.sent) == 4, "a wire with nothing unsent was waited for"
    wire.stalled = True
    for number in (1, 2, 3):
        outbox.put(parcel(requests[number]))
    assert names(wire)[4:] == ["1", "2"]
    for _ in range(3):  # slow, but it takes something each time
        clock[0] += 9.0
        wire.pending_bytes -= 1
        outbox.send_all()
    clock[0] += 9.9
    outbox.send_all()
    assert failed == [] and not wire.ended
    clock[0] += 0.2
    outbox.send_all()
    assert failed == [requests[3]] and wire.ended
    outbox.forget(wire)
    outbox.put(parcel(requests[4]))
    assert failed == [requests[3], requests[4]] and len(wires.made) == 1
    clock[0] += 5.1
    outbox.put(parcel(request("later")))
    assert names(wires.made[1][1]) == ["later"]


def full(outbox, wires, monkeypatch, waiting: PrefillRequest) -> Wire:
    """A wire that has more than it may and takes no more, and a parcel that waits for it."""
    monkeypatch.setattr(prefill.outbox, "UNSENT_BYTES_MAX", 50)
    outbox.put(parcel(request()))
    wire = wires.made[-1][1]
    wire.stalled = True
    for sent in (request(), waiting):
        outbox.put(parcel(sent))
    assert len(wire.sent) == 2
    return wire


def test_a_decode_node_whose_gpu_is_being_joined_takes_nothing_yet(outbox, wires, failed, monkeypatch, clock):
    waiting = request("waiting")
    wire = full(outbox, wires, monkeypatch, waiting)
    for _ in range(6):
        clock[0] += 9.0
        wire.joined_s = clock[0]
        outbox.send_all()
    clock[0] += 9.9  # joined by now
    outbox.send_all()
    assert failed == [] and not wire.ended
    clock[0] += 0.2
    outbox.send_all()
    assert failed == [waiting] and wire.ended


def test_a_gpu_that_does_not_let_go_holds_up_no_other_line(outbox, wires, failed, monkeypatch, clock):
    waiting, freed = request("waiting"), threading.Event()
    wire = full(outbox, wires, monkeypatch, waiting)
    wire.close = lambda: freed.wait(5)
    clock[0] += 10.1
    outbox.start()
    begin_s = time.monotonic()
    outbox.put(parcel(request("other", address="memory://e")))
    while (len(wires.made) < 2 or not wires.made[1][1].sent) and time.monotonic() < begin_s + 1.0:
        time.sleep(0.005)
    try:
        assert (failed, wire.ended) == ([waiting], True)
        assert names(wires.made[1][1]) == ["other"]
    finally:
        freed.set()
        outbox.close()


def test_what_a_decode_node_takes_at_last_goes_on_in_order(outbox, wires, monkeypatch):
    monkeypatch.setattr(prefill.outbox, "UNSENT_BYTES_MAX", 50)
    sent = request()
    outbox.put(parcel(sent))
    ((_, wire),) = wires.made
    wire.stalled = True
    for layer in range(1, 5):
        outbox.put(parcel(sent, layer))
    outbox.put(Parcel(sent, 0, 0, 0, None, 17))
    assert len(wire.sent) == 2
    wire.stalled, wire.pending_bytes = False, 0
    outbox.send_all()
    assert [body.get("layer") for _, body, _ in wire.sent] == [0, 1, 2, 3, 4, None]


def test_a_dropped_request_does_not_wait_for_a_full_channel(outbox, wires, monkeypatch):
    monkeypatch.setattr(prefill.outbox, "UNSENT_BYTES_MAX", 50)
    outbox.put(parcel(request()))
    ((_, wire),) = wires.made
    wire.stalled = True
    gone = request("gone")
    for _ in range(3):
        outbox.put(parcel(gone))
    gone.is_dropped = True
    outbox.send_all()
    assert len(wire.sent) == 2
    assert outbox._waiting() == []


def test_decode_nodes_have_equal_shares_of_what_may_wait(outbox, wires, monkeypatch):
    size_bytes = parcel(request()).size_bytes
    monkeypatch.setattr(prefill.outbox, "UNSENT_BYTES_MAX", 0)
    monkeypatch.setattr(prefill.outbox, "QUEUED_BYTES_MAX", 2 * size_bytes)
    for address in ("memory://d", "memory://e"):
        outbox.put(parcel(request(address=address)))
        wires.made[-1][1].pending_bytes = 1
    outbox.put(parcel(request()))
    assert outbox.has_room("memory://d")
    outbox.put(parcel(request(address="memory://e")))
    assert not outbox.has_room("memory://d") and not outbox.has_room("memory://e")
    assert outbox.has_room("memory://f")
    wires.made[1][1].pending_bytes = 0
    outbox.send_all()
    assert outbox.has_room("memory://d") and outbox.has_room("memory://e")


def test_where_nobody_answers_is_not_tried_again_for_each_request(outbox, wires, failed, monkeypatch, clock):
    tries = []

    def nobody(address, timeout_s):
        tries.append(address)
        clock[0] += timeout_s
        raise ConnectFailed(f"nobody answers at {address}")

    with monkeypatch.context() as during:
        during.setattr(wires, "connect", nobody)
        requests = [request(str(number)) for number in range(5)]
        for some in requests:
            outbox.put(parcel(some))
    assert (len(tries), failed) == (1, requests)
    outbox.put(parcel(request(address="memory://e")))
    clock[0] += 5.0
    outbox.put(parcel(request("back")))
    assert [address for address, _ in wires.made] == ["memory://e", "memory://d"]


def test_a_decode_node_that_never_reads_holds_up_no_other(monkeypatch):
    """Real sockets and threads: one endpoint is never polled, the other one has its frame at once."""
    monkeypatch.setattr(prefill.outbox, "UNSENT_BYTES_MAX", 1 << 20)
    arrived: list[str] = []
    addresses = ["memory://outbox-frozen", "memory://outbox-well"]
    frozen, well = (Endpoint(a, "s", a, lambda _, frame: arrived.append(frame.kind)) for a in addresses)
    own = Endpoint("memory://outbox-own", "s", "own", lambda *_: None)
    outbox = Outbox(own, lambda request: None)
    for part in (well, own, outbox):
        part.start()
    stuck, large = request("stuck", addresses[0]), torch.zeros(1 << 20)
    for layer in range(8):
        outbox.put(Parcel(stuck, layer, 0, 1 << 10, HostCopy(large)))
    time.sleep(0.1)
    begin_s = time.monotonic()
    outbox.put(parcel(request("quick", addresses[1])))
    while not arrived and time.monotonic() < begin_s + 1.0:
        time.sleep(0.005)
    assert arrived == ["Latents"]
    assert outbox._waiting(), "the frozen node took all: nothing was tested"
    assert outbox.is_alive
    outbox.close()
    assert not outbox.is_alive
    for part in (own, well, frozen):
        part.close()


def test_a_thread_of_its_own_sends_all_and_ends(outbox, wires, failed):
    outbox.start()
    requests = [request(str(number)) for number in range(50)]
    for some in requests:
        outbox.put(parcel(some))
    outbox.close()
    sent = [body["request_id"] for _, body, _ in wires.made[0][1].sent]
    assert sent == [str(number) for number in range(50)]
    assert failed == []


def test_a_parcel_that_cannot_be_sent_at_all_fails_its_request_and_not_the_thread(outbox, wires, failed):
    odd = request("odd")
    outbox.start()
    outbox.put(Parcel(odd, 0, 0, 3, HostCopy(torch.zeros(3, 4, dtype=torch.bool))))
    outbox.put(parcel(request("next")))
    outbox.close()
    assert failed == [odd]
    assert [body["request_id"] for _, body, _ in wires.made[0][1].sent] == ["next"]
