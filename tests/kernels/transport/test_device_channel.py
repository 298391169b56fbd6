"""Parts from GPU to GPU, over a stand-in: order, sizes, refusals, deaths, and no hang without a name."""

import contextlib
import errno
import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kernels.transport import device_wire
from kernels.transport.connect import LINKS, accepted, connect, listen, welcome
from kernels.transport.device_channel import DeviceChannel
from kernels.transport.device_wire import OWN
from kernels.transport.endpoint import Endpoint
from kernels.transport.errors import (
    ChannelClosed,
    ChannelStalled,
    ChannelTimeout,
    ConnectFailed,
    DeviceLinkFailed,
    DeviceTransferFailed,
    FrameMalformed,
    FrameTooLarge,
    FrameTruncated,
    HelloRefused,
)
from kernels.transport.frame import HELLO, FrameLimits, encode
from kernels.transport.sockets import dial
from kernels.transport.stream import StreamChannel
from tests.kernels.transport.conftest import SECRET, WAIT_S, Pair
from tests.kernels.transport.stand_in_link import Behaviour, StandInLink

SOON_S = 0.05


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """What the stand-ins of a test do; they are `nccl://` meanwhile, and the watchdog is quick."""
    behaviour = Behaviour()
    monkeypatch.setitem(LINKS, "nccl", lambda: StandInLink(behaviour))
    monkeypatch.setattr(StandInLink, "joints", {})
    monkeypatch.setattr(device_wire, "WATCH_S", 0.01)
    monkeypatch.setattr(device_wire, "GRACE_S", 0.1)
    monkeypatch.setattr(device_wire, "QUIET_WAIT_S", 2.0)
    return behaviour


@contextlib.contextmanager
def joined(address: str = "nccl://127.0.0.1:0") -> Iterator[Pair]:
    """Two ends of a channel, the hello behind them, held by no endpoint."""
    with contextlib.closing(listen(address)) as listener:
        here = connect(listener.address, SECRET, "here")
        there = accepted(listener.accept(), listener.address)
    with contextlib.closing(here), contextlib.closing(there):
        welcome(there, there.receive(WAIT_S), SECRET, FrameLimits())
        yield Pair(here, there)


@pytest.fixture
def pair(behaviour: Behaviour) -> Iterator[Pair]:
    with joined() as pair:
        yield pair


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def eventually(happened: Callable[[], object]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end_s, "it never happened"
        time.sleep(0.002)


def sent(channel: DeviceChannel) -> StandInLink:
    return channel._link


# what crosses


def test_tensors_go_from_device_to_device_and_views_beside_them(pair):
    latents, ids = numbers(5, 8, dtype=torch.bfloat16), numbers(3).to(torch.int64)
    pair.here.send("latents", {"layer": 3}, [latents, memoryview(b"small"), ids, memoryview(b"")])
    frame = pair.there.receive(WAIT_S)
    assert (frame.kind, frame.body, frame.refused) == ("latents", {"layer": 3}, False)
    assert torch.equal(frame.parts[0].view(torch.bfloat16).view(5, 8), latents)
    assert torch.equal(frame.parts[2].view(torch.int64), ids)
    assert [bytes(frame.parts[1]), bytes(frame.parts[3])] == [b"small", b""]
    pair.here.flush(WAIT_S)
    assert not pair.here.has_pending
    assert sent(pair.here).moved_bytes + sent(pair.there).moved_bytes == latents.nbytes + ids.nbytes


@pytest.mark.parametrize("sizes", [[0], [0, 0], [1], [7, 0, 70_000, 0, 3], [5] * 300], ids=str)
def test_parts_of_any_size_arrive_in_order(pair, sizes):
    parts = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    pair.here.send("parts", None, parts)
    pair.here.send("next")
    frame = pair.there.receive(WAIT_S)
    assert all(torch.equal(got, given) for got, given in zip(frame.parts, parts, strict=True))
    assert pair.there.receive(WAIT_S).kind == "next"
    pair.here.flush(WAIT_S)


def test_frames_with_and_without_tensors_stay_in_order_both_ways(pair, behaviour):
    behaviour.delay_s = 0.001
    tensors = [numbers(number + 1) for number in range(20)]
    for number, tensor in enumerate(tensors):
        for channel in (pair.here, pair.there):
            channel.send("tensor", number, [tensor])
            channel.send("plain", number, [memoryview(bytes([number]))])
    for number, tensor in enumerate(tensors):
        for channel in (pair.there, pair.here):
            frame = channel.receive(WAIT_S)
            assert (frame.kind, frame.body) == ("tensor", number)
            assert torch.equal(frame.parts[0].view(torch.float32), tensor)
            frame = channel.receive(WAIT_S)
            assert (frame.kind, frame.body, bytes(frame.parts[0])) == ("plain", number, bytes([number]))


def test_large_tensors_both_ways_at_once_do_not_wait_for_each_other(pair):
    down, up = numbers(1 << 20), numbers(1 << 20)
    pair.here.send("large", None, [down])
    pair.there.send("large", None, [up])
    assert torch.equal(pair.here.receive(WAIT_S).parts[0].view(torch.float32), up)
    assert torch.equal(pair.there.receive(WAIT_S).parts[0].view(torch.float32), down)


def test_what_the_peer_answers_is_heard_though_its_frames_are_not_wanted_yet(pair):
    for number in range(3):
        pair.there.send("unread", number, [memoryview(bytes(1000)), numbers(9)])
    tensor = numbers(50)
    pair.here.send("wanted", None, [tensor])
    assert torch.equal(pair.there.receive(WAIT_S).parts[0].view(torch.float32), tensor)
    pair.here.flush(WAIT_S)  # reads nothing of what stands before the answer away
    assert [pair.here.receive(WAIT_S).body for _ in range(3)] == [0, 1, 2]


def test_bytes_before_a_transfer_that_the_socket_did_not_take_leave_by_themselves(pair):
    eventually(lambda: sent(pair.here).opened and sent(pair.there).opened)
    large, tensor = bytes(48 << 20), numbers(5)
    pair.here.send("large", None, [memoryview(large), tensor])
    assert StreamChannel.has_pending.fget(pair.here)
    frame = pair.there.receive(WAIT_S / 4)  # nobody pushes here
    assert frame.parts[0] == large
    assert torch.equal(frame.parts[1].view(torch.float32), tensor)


def test_frames_of_many_threads_stay_whole(pair):
    def send(thread: int) -> None:
        for number in range(10):
            pair.here.send("one of many", [thread, number], [torch.full((40,), thread * 16 + number)])

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    seen = []
    for _ in range(40):
        frame = pair.there.receive(WAIT_S)
        thread, number = frame.body
        assert (frame.parts[0].view(torch.int64) == thread * 16 + number).all()
        seen.append((thread, number))
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(thread, number) for thread in range(4) for number in range(10)]
    assert all(sorted(n for t, n in seen if t == thread) == list(range(10)) for thread in range(4))


# where it goes


@pytest.mark.parametrize("runs", [[48], [16, 32], [1, 40, 7], [4] * 12], ids=str)
def test_a_part_goes_straight_into_the_tensors_chosen(pair, runs):
    pages = torch.zeros(64, 2, dtype=torch.int32)
    first, second = torch.arange(40, dtype=torch.int32), torch.arange(40, 96, dtype=torch.int32)
    chosen, begin = [], 8
    for run in runs:
        chosen.append(pages[begin : begin + run])
        begin += run
    ids, headers = bytearray(4), []
    pair.here.send("latents", 1, [first, memoryview(b"abcd"), second])
    views = [memoryview(ids)[:1], memoryview(ids)[1:]]
    frame = pair.there.receive(WAIT_S, lambda header: headers.append(header) or [views[0], *chosen, views[1]])
    assert (headers[0].part_sizes, headers[0].on_device) == ((160, 4, 224), (True, False, True))
    assert pages[8:56].flatten().tolist() == list(range(96))
    assert not pages[:8].any() and not pages[56:].any()
    assert ids == b"abcd"
    assert len(frame.parts) == len(runs) + 2
    assert sent(pair.there).moved_bytes + sent(pair.here).moved_bytes == 384


def test_what_is_refused_never_moves_and_the_next_is_intact(pair):
    for number in range(3):
        pair.here.send("unwanted", number, [numbers(1000), memoryview(b"and this")])
    wanted = numbers(5)
    pair.here.send("wanted", None, [wanted])
    for number in range(3):
        frame = pair.there.receive(WAIT_S, lambda header: None)
        assert (frame.kind, frame.body, frame.parts, frame.refused) == ("unwanted", number, [], True)
    assert torch.equal(pair.there.receive(WAIT_S).parts[0].view(torch.float32), wanted)
    pair.here.flush(WAIT_S)
    assert sent(pair.here).moved_bytes + sent(pair.there).moved_bytes == wanted.nbytes
    assert sent(pair.here).sends_count == 1


@pytest.mark.parametrize(
    "chosen", [[], [torch.empty(9)], [torch.empty(5), torch.empty(6)], [memoryview(bytearray(40))]]
)
def test_memory_of_another_size_or_place_ends_the_channel(pair, chosen):
    pair.here.send("ten", None, [torch.zeros(10)])
    with pytest.raises(FrameMalformed, match="memory chosen"):
        pair.there.receive(WAIT_S, lambda header: chosen)
    with pytest.raises(ChannelClosed):
        pair.there.receive(WAIT_S)
    with pytest.raises(ChannelClosed):
        pair.here.flush(WAIT_S)


def test_more_than_the_limits_allow_ends_the_channel(pair):
    eventually(lambda: sent(pair.there).opened)
    pair.there.reader.limits = FrameLimits(payload_bytes_max=100)
    pair.here.send("fits", None, [torch.zeros(25)])
    pair.here.send("does not", None, [torch.zeros(26)])
    assert pair.there.receive(WAIT_S).kind == "fits"
    with pytest.raises(FrameTooLarge, match="104 bytes"):
        pair.there.receive(WAIT_S)


def test_strided_tensors_and_those_of_other_devices_are_not_sent(pair):
    with pytest.raises(ValueError, match="contiguous"):
        pair.here.send("strided", None, [torch.zeros(4, 4).T])
    with pytest.raises(ValueError, match="another device"):
        pair.here.send("elsewhere", None, [torch.zeros(4, device="meta")])
    with pytest.raises(TypeError):
        pair.here.send("unpackable", object(), [torch.zeros(4)])
    assert not pair.here.has_pending
    pair.here.send("well", None, [torch.ones(4)])
    assert pair.there.receive(WAIT_S).kind == "well"


def test_a_transfer_is_not_here_before_its_last_byte(pair, behaviour):
    behaviour.delay_s = 0.1
    pair.here.send("slow", None, [numbers(5)])
    with pytest.raises(ChannelTimeout):
        pair.there.receive(SOON_S)
    assert pair.here.has_pending
    assert pair.here.pending_bytes >= numbers(5).nbytes
    with pytest.raises(ChannelTimeout):
        pair.here.flush(0.0)
    assert pair.there.receive(WAIT_S).kind == "slow"
    pair.here.flush(WAIT_S)
    assert not pair.here.has_pending
    assert pair.here.pending_bytes == 0


def test_nothing_is_posted_before_the_receiver_is_ready(pair):
    pair.here.send("early", None, [numbers(5)])
    time.sleep(SOON_S)
    assert sent(pair.here).sends_count == 0
    pair.there.receive(WAIT_S)
    assert sent(pair.here).sends_count == 1


def test_a_peer_that_never_takes_what_is_announced_is_stalled(pair):
    pair.here.pending_bytes_max = 1000
    pair.here.send("larger than the limit, and allowed alone", None, [torch.zeros(500)])
    with pytest.raises(ChannelStalled, match="2000 bytes on the device"):
        pair.here.send("one more", None, [torch.zeros(1)])
    with pytest.raises(ChannelClosed):
        pair.here.send("again")


# what goes wrong


def fails(error: type[Exception] | tuple, *uses: Callable[[], object], match: str | None = None) -> None:
    for use in uses:
        with pytest.raises(error, match=match):
            use()


@pytest.mark.parametrize("first", ["here", "there"])
def test_a_transfer_that_hangs_is_named_and_the_links_aborted(pair, behaviour, caplog, first):
    behaviour.hangs = True
    waits = {"here": lambda: pair.here.flush(WAIT_S), "there": lambda: pair.there.receive(WAIT_S)}
    channel = getattr(pair, first)
    channel.timeout_s = 0.05
    pair.here.send("stuck", None, [numbers(5)])
    if first == "here":
        eventually(lambda: pair.there._transfers.receiving or pair.there.receive_ready())
    fails(DeviceTransferFailed, waits[first], match="20 bytes between GPUs took longer than 0.05 s")
    uses = (lambda: channel.send("more"), channel.push, channel.receive_ready)
    fails(DeviceTransferFailed, *uses)
    assert sent(channel).aborted.wait(WAIT_S)
    assert "failed: DeviceTransferFailed" in caplog.text
    other = pair.there if first == "here" else pair.here
    fails((FrameTruncated, ChannelClosed), lambda: other.receive(WAIT_S))
    assert sent(other).aborted.wait(WAIT_S)


def test_an_error_that_the_library_notices_is_named(pair, behaviour):
    pair.here.send("well", None, [numbers(5)])
    pair.there.receive(WAIT_S)
    sent(pair.here).behaviour = Behaviour(broken=True)
    fails(DeviceTransferFailed, lambda: pair.here.receive(WAIT_S), match="the stand-in broke")
    assert sent(pair.here).aborted.wait(WAIT_S)


def test_an_error_of_posting_is_named(pair):
    sent(pair.there).behaviour = Behaviour(refuses=True)
    pair.here.send("refused by the library", None, [numbers(5)])
    fails(DeviceTransferFailed, lambda: pair.there.receive(WAIT_S), match="refuses")


def test_a_call_that_hangs_is_aborted_from_beside_it(pair, behaviour, monkeypatch):
    monkeypatch.setattr("kernels.transport.transfers.ABORT_WAIT_S", 0.05)
    behaviour.posting_hangs = True
    pair.there.timeout_s = 0.05
    pair.here.send("stuck", None, [numbers(5)])
    fails(DeviceTransferFailed, lambda: pair.there.receive(WAIT_S))
    fails(ChannelClosed, lambda: pair.here.flush(WAIT_S))


def test_gpus_that_are_not_joined_in_time_are_named(behaviour):
    behaviour.opening_hangs = True
    with joined() as pair:
        pair.here.open_timeout_s = 0.05
        pair.here.send("waits for the link", None, [numbers(5)])
        fails(DeviceLinkFailed, lambda: pair.here.flush(WAIT_S), match="not joined within 0.05 s")
        fails(FrameTruncated, lambda: pair.there.receive(WAIT_S))
        behaviour.opening_hangs = False


def test_frames_without_tensors_do_not_wait_for_the_link(behaviour):
    behaviour.opening_hangs = True
    with joined() as pair:
        pair.here.send("plain", None, [memoryview(b"abc")])
        pair.here.send("tensor", None, [numbers(5)])
        assert pair.there.receive(WAIT_S).kind == "plain"
        assert pair.there.receive_ready() is None
        behaviour.opening_hangs = False
        assert pair.there.receive(WAIT_S).kind == "tensor"


def test_what_comes_before_the_peer_agrees_to_join_wakes_its_owner(behaviour):
    freed = threading.Event()
    with contextlib.closing(listen("nccl://127.0.0.1:0")) as listener:
        here = connect(listener.address, SECRET, "here")
        there = accepted(listener.accept(), listener.address)
    sent(here).confirm = lambda _: freed.wait(WAIT_S) and {"number": "agreed"}
    with contextlib.closing(here), contextlib.closing(there):
        welcome(there, there.receive(WAIT_S), SECRET, FrameLimits())
        here.send("early")
        eventually(lambda: there._aside)
        poller = select.poll()
        poller.register(there, select.POLLIN)
        assert poller.poll(1000) and there.receive_ready().kind == "early"
        freed.set()


def test_a_peer_that_dies_inside_a_transfer_is_truncated(pair, behaviour):
    behaviour.delay_s = 3600
    pair.here.send("last", None, [numbers(5)])
    with pytest.raises(ChannelTimeout):
        pair.there.receive(SOON_S)
    eventually(lambda: sent(pair.here).sends_count)
    pair.here.close()
    fails(FrameTruncated, lambda: pair.there.receive(WAIT_S), lambda: pair.there.receive(WAIT_S))
    assert sent(pair.there).aborted.wait(WAIT_S)


def test_a_peer_that_dies_before_it_takes_what_was_announced_is_gone(pair):
    pair.here.send("to nobody", None, [numbers(5)])
    pair.there.close()
    fails(ChannelClosed, lambda: pair.here.flush(WAIT_S), lambda: pair.here.send("more", None, [numbers(5)]))


def test_who_sends_as_the_channel_ends_hears_of_the_end(pair, monkeypatch):
    send = StreamChannel.send

    def end_first(channel: StreamChannel, kind: str, *rest: object) -> None:
        if kind == "late":  # announced, and not yet on its way
            channel.close()
        send(channel, kind, *rest)

    eventually(lambda: sent(pair.here).opened)
    monkeypatch.setattr(StreamChannel, "send", end_first)
    fails(ChannelClosed, lambda: pair.here.send("late", None, [numbers(5)]))


def test_a_peer_that_dies_after_it_took_all_is_no_loss(pair):
    pair.here.send("last", None, [numbers(5)])
    pair.there.receive(WAIT_S)
    pair.there.close()
    eventually(lambda: not pair.here.has_pending)


def test_what_was_said_before_the_end_is_still_read(pair):
    tensor = numbers(5)
    pair.here.send("one", None, [memoryview(b"abc")])
    pair.here.send("two", None, [tensor])
    assert pair.there.receive(WAIT_S).kind == "one"
    assert torch.equal(pair.there.receive(WAIT_S).parts[0].view(torch.float32), tensor)
    pair.here.flush(WAIT_S)
    pair.here.send("three")
    pair.here.close()
    assert pair.there.receive(WAIT_S).kind == "three"
    fails(ChannelClosed, lambda: pair.there.receive(WAIT_S))


def test_closing_waits_until_no_gpu_touches_the_memory_any_more(pair, behaviour):
    behaviour.delay_s = 0.05
    target = torch.zeros(5)
    pair.here.send("late", None, [torch.ones(5)])
    with pytest.raises(ChannelTimeout):
        pair.there.receive(0.01, lambda header: [target])
    pair.there.close()
    assert sent(pair.there).aborted.is_set()
    time.sleep(0.1)
    pair.here._transfers.act()
    assert not target.any()


def test_memory_of_a_link_that_cannot_be_aborted_is_kept(pair, behaviour, monkeypatch, caplog):
    monkeypatch.setattr(device_wire, "QUIET_WAIT_S", 0.05)
    behaviour.hangs = behaviour.aborting_fails = True
    pair.here.send("stuck", None, [numbers(5)])
    with pytest.raises(ChannelTimeout):
        pair.there.receive(SOON_S)
    pair.there.close()
    assert "could not be aborted" in caplog.text
    assert pair.there._transfers.receiving
    assert not pair.there.is_quiet


def test_a_channel_is_quiet_but_while_something_moves(pair, behaviour):
    assert pair.here.is_quiet and pair.there.is_quiet
    behaviour.delay_s = 3600
    pair.here.send("late", None, [torch.ones(5)])
    with pytest.raises(ChannelTimeout):
        pair.there.receive(0.01)
    assert not pair.here.is_quiet and not pair.there.is_quiet
    for channel in (pair.there, pair.here):
        channel.close()
        assert channel.is_quiet


def test_connecting_again_joins_anew(behaviour):
    behaviour.hangs = True
    with joined() as pair:
        pair.there.timeout_s = 0.02
        pair.here.send("lost", None, [numbers(5)])
        fails(DeviceTransferFailed, lambda: pair.there.receive(WAIT_S))
    behaviour.hangs = False
    with joined() as pair:
        pair.here.send("found", None, [numbers(5)])
        assert pair.there.receive(WAIT_S).kind == "found"


@pytest.mark.parametrize(
    "word",
    [
        None,
        [],
        ["taken", [4]],
        ["taken", "4"],
        ["taken", [20, 0]],
        ["taken", [20.0]],
        ["taken", [1] * 5000],
        ["refused", None],
        ["welcome", {}],
        ["joining", {}],
        ["link", "nonsense"],
        ["unheard of", 1],
    ],
    ids=lambda word: str(word)[:20],
)
def test_words_out_of_turn_end_the_channel(pair, word):
    eventually(lambda: sent(pair.here).opened)
    StreamChannel.send(pair.there, OWN, word)
    fails(FrameMalformed, lambda: pair.here.receive(WAIT_S))


def test_a_taken_of_another_size_ends_the_channel(pair):
    pair.here.send("twenty", None, [torch.zeros(5)])
    StreamChannel.send(pair.there, OWN, ["taken", [19]])
    fails(ChannelClosed, lambda: pair.here.flush(WAIT_S))
    fails(FrameMalformed, lambda: pair.here.receive(WAIT_S), match="19 bytes were taken of a transfer of 20")


def test_links_can_talk(pair):
    eventually(lambda: sent(pair.here).opened and sent(pair.there).opened)
    sent(pair.here).tell("a word")
    eventually(lambda: pair.there._take_in() or sent(pair.there).heard)
    assert sent(pair.there).heard == ["a word"]


@pytest.mark.parametrize("offer", [None, 5, {"number": -1}, "missing"])
def test_a_hello_without_an_offer_of_use_is_refused(behaviour, offer):
    hello = {"version": 1, "secret": SECRET, "name": "guest"} | (
        {} if offer == "missing" else {"device": offer}
    )
    with contextlib.closing(listen("nccl://127.0.0.1:0")) as listener, contextlib.ExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(dial(listener.address, WAIT_S)))
        sock.sendall(encode(HELLO, hello, []))
        there = stack.enter_context(contextlib.closing(accepted(listener.accept(), listener.address)))
        frame = there.receive(WAIT_S)
        with pytest.raises(HelloRefused):
            welcome(there, frame, SECRET, FrameLimits())
        assert there.peer == ""


def raising(error: Exception) -> Callable[[], None]:
    def fail(*_: object) -> None:
        raise error

    return fail


NO_MEMORY = RuntimeError("CUDA error: out of memory\n/a/path/in/its/words")
NO_DESCRIPTOR = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    ("where", "error"),
    [("link", NO_MEMORY), ("doorbell", NO_DESCRIPTOR)],
)
def test_who_cannot_make_a_channel_says_so_and_keeps_no_socket(behaviour, monkeypatch, where, error):
    with contextlib.closing(listen("nccl://127.0.0.1:0")) as listener:
        dialled = dial(listener.address, WAIT_S)
        knocked = listener.accept()
        with contextlib.closing(dialled), monkeypatch.context() as scarce:
            if where == "link":
                scarce.setitem(LINKS, "nccl", raising(error))
            else:
                scarce.setattr(device_wire, "Doorbell", raising(error))
            with pytest.raises(ConnectFailed, match=type(error).__name__):
                connect(listener.address, SECRET, "me")
            with pytest.raises(OSError, match=type(error).__name__):
                accepted(knocked, listener.address)
            assert knocked.fileno() == -1


def test_who_is_turned_away_is_told_by_the_end(behaviour):
    with contextlib.closing(Endpoint("nccl://127.0.0.1:0", SECRET, "there", lambda *_: None)) as endpoint:
        endpoint.start()
        with contextlib.closing(connect(endpoint.address, "a guess", "me")) as channel:
            fails(ChannelClosed, lambda: channel.receive(WAIT_S))
            fails(ChannelClosed, lambda: channel.send("hope", None, [numbers(5)]))
    assert sent(channel).aborted.wait(WAIT_S)
    assert not sent(channel).opened


@pytest.fixture
def links(behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch) -> list[StandInLink]:
    """The stand-ins made meanwhile, in order; listening makes the first."""
    made: list[StandInLink] = []
    monkeypatch.setitem(LINKS, "nccl", lambda: made.append(StandInLink(behaviour)) or made[-1])
    return made


def test_nobody_joins_a_gpu_whose_process_has_gone_already(links):
    peers = []
    endpoint = Endpoint("nccl://127.0.0.1:0", SECRET, "there", lambda *_: None, on_closed=peers.append)
    with contextlib.closing(endpoint):
        here = connect(endpoint.address, SECRET, "here")
        here.close()  # its hello waits in the socket, and so does its end
        while not peers:
            endpoint.poll(SOON_S)
        for thread in [*here._threads, *peers[0]._threads]:
            thread.join(WAIT_S)
            assert not thread.is_alive()
    assert len(links) == 3 and not any(link.opening for link in links)


def test_nobody_joins_who_could_not_be_told_of_it(links):
    with contextlib.closing(listen("nccl://127.0.0.1:0")) as listener:
        here = connect(listener.address, SECRET, "here")
        there = accepted(listener.accept(), listener.address)
    with contextlib.closing(here), contextlib.closing(there):
        here.send("more than a socket takes", None, [memoryview(bytes(32 << 20))])
        StreamChannel.send(there, OWN, ["welcome", links[-1].answer(links[-2].offer())])
        eventually(here._agreed.is_set)
        with here._lock:
            here._stop_sending()
        here._threads[0].join(WAIT_S)
        assert not here._threads[0].is_alive() and not links[-2].opening


def test_who_is_not_listened_to_is_read_up_to_a_limit(pair, monkeypatch):
    monkeypatch.setattr(device_wire, "ASIDE_BYTES_MAX", 10_000)
    for number in range(3000):
        pair.there.send("unread", [number, "x" * 100])
    pair.here.send("moving", None, [numbers(5)])  # so that the other end is read too
    eventually(lambda: pair.here._aside_bytes > 10_000)
    time.sleep(SOON_S)
    assert pair.here._aside_bytes < 10_200
    assert [pair.here.receive(WAIT_S).body[0] for _ in range(3000)] == list(range(3000))
    assert pair.here._aside_bytes == 0
    pair.there.receive(WAIT_S)
    pair.here.flush(WAIT_S)


# with endpoints


def test_endpoints_carry_tensors_in_threads_of_their_own(behaviour):
    cache = torch.zeros(20, 8)
    arrived, answered, refused = threading.Event(), [], []

    def on_frame(channel, frame):
        if frame.refused:
            refused.append(frame.body)
        if frame.kind == "row" and frame.body == 19:
            channel.send("done", None, [cache.sum().view(1)])
            arrived.set()

    def choose(channel, header):
        return None if header.kind == "unwanted" else [cache[header.body]]

    there = Endpoint("nccl://127.0.0.1:0", SECRET, "there", on_frame, choose_buffers=choose)
    here = Endpoint("nccl://127.0.0.1:0", SECRET, "here", lambda channel, frame: answered.append(frame))
    rows = numbers(20, 8)
    with contextlib.closing(there), contextlib.closing(here):
        there.start()
        here.start()
        channel = here.connect(there.address)
        for number in range(20):
            channel.send("unwanted", number, [numbers(3)])
            channel.send("row", number, [rows[number]])
        assert arrived.wait(WAIT_S)
        assert torch.equal(cache, rows)
        eventually(lambda: answered)
        assert torch.equal(answered[0].parts[0].view(torch.float32)[0], rows.sum())
        assert refused == [*range(20)]


def test_an_endpoint_is_told_of_the_end_only_when_the_memory_is_free(behaviour):
    behaviour.delay_s = 3600
    ended = []
    there = Endpoint(
        "nccl://127.0.0.1:0",
        SECRET,
        "there",
        lambda *_: None,
        on_closed=lambda channel: ended.append(sent(channel).aborted.is_set()),
    )
    with contextlib.closing(there):
        there.start()
        channel = connect(there.address, SECRET, "here")
        channel.send("never whole", None, [numbers(5)])
        eventually(lambda: sent(channel).sends_count)
        channel.close()
        eventually(lambda: ended)
        assert ended == [True]


def test_the_end_of_a_channel_that_takes_long_keeps_no_other_waiting(behaviour):
    behaviour.delay_s = 3600
    may_abort, ended, frames = threading.Event(), [], []
    there = Endpoint(
        "nccl://127.0.0.1:0",
        SECRET,
        "there",
        lambda channel, frame: frames.append(frame.kind),
        on_closed=lambda channel: ended.append((channel.peer, channel.is_quiet)),
    )
    with contextlib.closing(there):
        there.start()
        first, second = (connect(there.address, SECRET, name) for name in ("first", "second"))
        with contextlib.closing(first), contextlib.closing(second):
            first.send("never whole", None, [numbers(5)])
            eventually(lambda: sent(first).sends_count)
            behaviour.on_abort = lambda: may_abort.wait(WAIT_S)
            first.end()
            eventually(lambda: any(channel.peer == "first" for channel in there._ended))
            second.send("meanwhile")
            eventually(lambda: frames)
            assert (frames, ended) == (["meanwhile"], [])
            may_abort.set()
            eventually(lambda: ended)
            assert ended == [("first", True)]


def test_an_endpoint_that_closes_waits_for_all_gpus_at_once(behaviour):
    behaviour.delay_s = 3600
    channels = []
    there = Endpoint("nccl://127.0.0.1:0", SECRET, "there", lambda channel, _: channels.append(channel))
    with contextlib.ExitStack() as stack:
        stack.callback(there.close)
        there.start()
        for number in range(5):
            here = stack.enter_context(contextlib.closing(connect(there.address, SECRET, f"peer {number}")))
            here.send("greeting")
            here.send("never whole", None, [numbers(5)])
            eventually(lambda here=here: sent(here).sends_count)
        all_at_it = threading.Barrier(5)
        theirs = set(map(sent, channels))
        for link in theirs:
            link.behaviour = Behaviour(delay_s=3600, on_abort=lambda: all_at_it.wait(1.0))
        there.close()
        assert len(theirs) == 5 and not all_at_it.broken
        assert all(link.aborted.is_set() for link in theirs)


def test_a_channel_that_never_becomes_quiet_is_closed_after_a_while(behaviour, monkeypatch, caplog):
    monkeypatch.setattr(device_wire, "QUIET_WAIT_S", 0.1)
    behaviour.delay_s, behaviour.aborting_fails = 3600, True
    ended = []
    there = Endpoint(
        "nccl://127.0.0.1:0",
        SECRET,
        "there",
        lambda *_: None,
        on_closed=lambda channel: ended.append((channel.is_quiet, channel.fileno())),
        stall_s=SOON_S,
    )
    with contextlib.closing(there), contextlib.closing(connect(there.address, SECRET, "here")) as here:
        there.start()
        here.send("never whole", None, [numbers(5)])
        eventually(lambda: sent(here).sends_count)
        here.end()
        eventually(lambda: ended)
        assert ended == [(False, -1)]


def test_an_idle_channel_uses_no_time(pair):
    eventually(lambda: sent(pair.here).opened and sent(pair.there).opened)
    turns = []
    pair.here._take_in = lambda: turns.append(1) or False
    time.sleep(SOON_S)
    assert turns == []


def test_who_waits_for_a_transfer_sleeps_though_another_frame_is_here(pair, behaviour):
    behaviour.delay_s = 0.3
    tensor = numbers(5)
    pair.here.send("slow", None, [tensor])
    pair.here.send("behind")
    turns, next_frame = [], pair.there._next_frame
    pair.there._next_frame = lambda choose: turns.append(1) or next_frame(choose)
    assert torch.equal(pair.there.receive(WAIT_S).parts[0].view(torch.float32), tensor)
    assert pair.there.receive(WAIT_S).kind == "behind"
    assert len(turns) < 200  # thousands where it spins


def test_threads_end_with_their_channels(behaviour, caplog):
    caplog.set_level(logging.WARNING)
    with joined() as pair:
        pair.here.send("one", None, [numbers(random.randint(1, 9))])
        pair.there.receive(WAIT_S)
        threads = [*pair.here._threads, *pair.there._threads]
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
