"""Parcels leave in order, wait for nobody who does not read, and are not sent for those who have gone."""

import pytest
import torch

import prefill.outbox
from decode.messages import FirstToken, Latents, SamplingParameters, checksum
from kernels.model.host_copies import HostCopy
from kernels.transport.errors import ChannelClosed, ChannelTimeout, ConnectFailed
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
        self.flushes_count = 0
        self.closed = False

    @property
    def has_pending(self) -> bool:
        return self.stalled

    def send(self, kind, body, parts=()):
        if self.closed:
            raise ChannelClosed("closed")
        self.sent.append((kind, body, [bytes(part) for part in parts]))

    def flush(self, timeout_s):
        self.flushes_count += 1
        if self.stalled:
            raise ChannelTimeout("the peer took nothing")

    def fileno(self):
        return -1 if self.closed else 3

    def close(self):
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
    outbox.put(parcel(request()))
    assert len(wires.made) == 2


def test_a_decode_node_that_falls_behind_is_waited_for_but_not_without_end(
    outbox, wires, failed, monkeypatch
):
    """Only a thread of the outbox's own may wait; so this one says it has one, and is moved by hand."""
    monkeypatch.setattr(prefill.outbox, "UNSENT_BYTES_MAX", 100)
    outbox._thread = object()
    requests = [request(str(number)) for number in range(4)]
    outbox._send(parcel(requests[0]))
    ((_, wire),) = wires.made
    for number in (0, 0, 0):
        outbox._send(parcel(requests[number]))
    assert wire.flushes_count == 0, "a wire with nothing unsent was waited for"
    wire.stalled = True
    outbox._send(parcel(requests[1]))
    assert (wire.flushes_count, failed) == (0, [])
    outbox._send(parcel(requests[2]))
    assert wire.flushes_count == 1 and wire.closed
    assert failed == [requests[2]]
    outbox.forget(wire)
    outbox._send(parcel(requests[3]))
    assert failed == [requests[2]]


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
