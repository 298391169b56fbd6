"""Endpoints: one bad peer loses its channel and nothing else, and closing is safe from anywhere."""

import errno
import logging
import os
import queue
import random
import selectors
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.transport.connect import connect
from kernels.transport.endpoint import FRAMES_PER_TURN
from kernels.transport.errors import ChannelClosed, ChannelError, ChannelStalled, FrameMalformed, HelloRefused
from kernels.transport.frame import MAGIC, PREFIX, FrameLimits, encode
from kernels.transport.sockets import dial
from kernels.transport.stream import StreamChannel
from tests.kernels.transport.conftest import SECRET, TURN_S, TURNS_MAX, WAIT_S

STALL_S = 0.05
HELLO = encode("hello", {"version": 1, "secret": SECRET, "name": "guest"}, [])
LARGE_BYTES = 64 << 20

BROKEN = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(64),
    "hello too large": PREFIX.pack(MAGIC, 5000, 0),
    "hello with a payload": encode(
        "hello", {"version": 1, "secret": SECRET, "name": "g"}, [memoryview(b"x")]
    ),
    "no msgpack": PREFIX.pack(MAGIC, 4, 0) + b"\xc1" * 4,
    "another first frame": encode("Dispatch", None, []),
    "wrong secret": encode("hello", {"version": 1, "secret": "guess", "name": "guest"}, []),
    "no secret": encode("hello", {"version": 1, "name": "guest"}, []),
    "garbage after the hello": HELLO + b"garbage of sixteen bytes",
    "header too large": HELLO + PREFIX.pack(MAGIC, 1001, 0),
    "payload too large": HELLO + PREFIX.pack(MAGIC, 1, 5001),
    "sizes that lie": HELLO + PREFIX.pack(MAGIC, 7, 10) + msgpack.packb(["k", 1, [9]]).ljust(7, b"\xc1"),
    "half a hello, then the end": HELLO[:20],
    "half a frame, then the end": HELLO + encode("k", None, [memoryview(bytes(100))]) + bytes(99),
}
LIMITS = FrameLimits(header_bytes_max=1000, payload_bytes_max=5000)


def answering(make_peer, address, **options):
    """A peer that answers every frame with its body and parts."""
    return make_peer(
        address, on_frame=lambda channel, frame: channel.send("answer", frame.body, frame.parts), **options
    )


def ask(peer, channel, body=None, parts=()):
    """The answer of a polled peer."""
    channel.send("ask", body, parts)
    for _ in range(TURNS_MAX):
        peer.endpoint.poll(TURN_S)
        channel.push()
        frame = channel.receive_ready()
        if frame is not None:
            return frame
    raise AssertionError("no answer")


def ends(channel: StreamChannel) -> None:
    """The other side closes this channel."""
    with pytest.raises(ChannelError):
        channel.receive(WAIT_S)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_frame_is_answered_and_the_peers_named(address, make_peer, make_channel):
    peer = make_peer(address)
    channel = make_channel(peer.address, name="node-7")
    channel.send("ask", [1], [memoryview(b"abc"), memoryview(b"")])
    peer.poll_until(lambda: peer.frames)
    theirs, frame = peer.frames[0]
    assert (theirs.peer, frame.kind, frame.body) == ("node-7", "ask", [1])
    assert [bytes(part) for part in frame.parts] == [b"abc", b""]
    assert peer.counts.frames_count == 1


def test_two_endpoints_speak_in_threads_of_their_own(address, make_peer):
    answers = queue.SimpleQueue()
    here = make_peer("tcp://127.0.0.1:0", on_frame=lambda channel, frame: answers.put((channel, frame.body)))
    there = answering(make_peer, address)
    here.endpoint.start()
    there.endpoint.start()
    channel = here.endpoint.connect(there.address)
    assert channel.peer == there.address
    for number in range(20):
        channel.send("ask", number)
        assert answers.get(timeout=WAIT_S) == (channel, number)


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_who_breaks_the_protocol_loses_its_channel_alone(address, make_peer, make_channel, caplog, data):
    peer = answering(make_peer, address, limits=LIMITS)
    good = make_channel(peer.address)
    assert ask(peer, good, "before").body == "before"
    bad = dial(peer.address, WAIT_S)
    bad.sendall(data)
    bad.shutdown(1)
    peer.poll_until(lambda: peer.counts.refused_peers_count == 1)
    bad.close()
    assert ask(peer, good, "after").body == "after"
    assert "dropped" in caplog.text
    assert SECRET not in caplog.text
    assert len(peer.closed) == (1 if data.startswith(HELLO) else 0)  # a stranger that leaves is nobody's loss


def test_who_leaves_without_a_word_is_not_counted(address, make_peer):
    peer = make_peer(address)
    for _ in range(3):
        dial(peer.address, WAIT_S).close()
    for _ in range(5):
        peer.endpoint.poll(TURN_S)
    assert (peer.counts.refused_peers_count, peer.closed, peer.endpoint._channels) == (0, [], set())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.binary(min_size=PREFIX.size, max_size=300), greets=st.booleans(), framed=st.booleans())
def test_no_bytes_do_harm(make_peer, data, greets, framed):
    peer = answering(make_peer, "tcp://127.0.0.1:0", limits=LIMITS)
    sock = dial(peer.address, WAIT_S)
    sock.sendall((HELLO if greets else b"") + (PREFIX.pack(MAGIC, len(data), 0) if framed else b"") + data)
    sock.shutdown(1)
    channel = connect(peer.address, SECRET, "good")
    assert ask(peer, channel, 1).body == 1
    for _ in range(5):
        peer.endpoint.poll(0)
    assert ask(peer, channel, 2).body == 2
    channel.close()
    sock.close()
    peer.endpoint.close()


def test_a_wrong_secret_is_named_to_us_and_closed_to_them(address, make_peer, make_channel, caplog):
    peer = make_peer(address)
    channel = make_channel(peer.address, secret="guess")
    peer.poll_until(lambda: peer.counts.refused_peers_count)
    assert HelloRefused.__name__ in caplog.text
    assert "guess" not in caplog.text
    ends(channel)


@pytest.mark.parametrize(
    "data", [b"", HELLO[:7], HELLO[:-1], HELLO + MAGIC, HELLO + encode("k", 1, [memoryview(b"abc")]) + b"a"]
)
def test_half_a_frame_and_then_silence_is_dropped(address, make_peer, make_channel, data):
    peer = make_peer(address, stall_s=STALL_S)
    quiet = make_channel(peer.address)  # between frames one may be silent as long as one likes
    peer.poll_until(lambda: peer.endpoint._channels)
    sock = dial(peer.address, WAIT_S)
    sock.sendall(data)
    peer.poll_until(lambda: peer.counts.refused_peers_count)
    assert sock.recv(1) == b""
    sock.close()
    quiet.send("still here")
    peer.poll_until(lambda: peer.frames)


def test_many_who_say_nothing_are_not_kept_and_those_with_a_hello_are(
    address, make_peer, make_channel, monkeypatch
):
    monkeypatch.setattr("kernels.transport.endpoint.STRANGERS_MAX", 8)
    peer = make_peer(address)
    early = [make_channel(peer.address) for _ in range(10)]  # more than may be strangers, all with a hello
    silent = [dial(peer.address, WAIT_S) for _ in range(30)]
    good = make_channel(peer.address)
    good.send("here")
    peer.poll_until(lambda: peer.frames)
    assert peer.frames[0][0].peer == "guest"
    assert len([channel for channel in peer.endpoint._channels if not channel.peer]) <= 8
    assert len([channel for channel in peer.endpoint._channels if channel.peer]) == len(early) + 1
    assert len(silent) - 8 <= peer.counts.refused_peers_count <= len(silent)
    for sock in silent:
        sock.close()
    early[0].send("still here")
    peer.poll_until(lambda: len(peer.frames) == 2)


def test_a_hello_that_drips_is_dropped_in_the_same_time(make_peer, caplog):
    peer = make_peer("tcp://127.0.0.1:0", stall_s=STALL_S)
    sock = dial(peer.address, WAIT_S)
    sock.sendall(PREFIX.pack(MAGIC, 4096, 0))
    for _ in range(4000):
        sock.sendall(b"x")
        time.sleep(STALL_S / 50)
        peer.endpoint.poll(0)
        if peer.counts.refused_peers_count:
            break
    assert "no hello came" in caplog.text
    sock.close()


def test_a_peer_that_closes_inside_a_frame_is_named_and_told(address, make_peer, make_channel, caplog):
    peer = make_peer(address)
    sock = dial(peer.address, WAIT_S)
    sock.sendall(HELLO + encode("k", None, [memoryview(bytes(100))]) + bytes(50))
    peer.poll_until(lambda: any(channel.peer for channel in peer.endpoint._channels))
    sock.close()
    peer.poll_until(lambda: peer.closed)
    assert peer.closed[0].peer == "guest"
    assert peer.closed[0].fileno() == -1
    assert "FrameTruncated" in caplog.text


def test_an_end_is_told_once_whoever_makes_it(address, make_peer, make_channel):
    peer = make_peer(address)
    theirs, ours = make_channel(peer.address), make_channel(peer.address)
    for channel in (theirs, ours):
        channel.send("here")
    peer.poll_until(lambda: len(peer.frames) == 2)
    theirs.close()
    peer.poll_until(lambda: len(peer.closed) == 1)
    next(channel for channel, _ in peer.frames if channel not in peer.closed).close()
    peer.poll_until(lambda: len(peer.closed) == 2)
    peer.endpoint.poll(0)
    assert set(peer.closed) == {channel for channel, _ in peer.frames}
    ends(ours)


def test_a_payload_goes_where_the_owner_says(address, make_peer, make_channel):
    pages = bytearray(300_000)
    chosen = [memoryview(pages)[200_000:], memoryview(pages)[:0], memoryview(pages)[:100_000]]
    heads = []
    peer = make_peer(
        address, choose_buffers=lambda channel, header: heads.append((channel.peer, header)) or chosen
    )
    payload = random.randbytes(200_000)
    with ThreadPoolExecutor(1) as pool:
        channel = make_channel(peer.address)
        channel.send(
            "latents", 3, [memoryview(payload)[:70_000], memoryview(b""), memoryview(payload)[70_000:]]
        )
        flushed = pool.submit(channel.flush, WAIT_S)
        peer.poll_until(lambda: peer.frames)
        flushed.result()
    assert (heads[0][0], heads[0][1].body, heads[0][1].payload_bytes) == ("guest", 3, 200_000)
    assert pages[200_000:] == payload[:100_000]
    assert pages[:100_000] == payload[100_000:]
    assert pages[100_000:200_000] == bytes(100_000)


def test_a_refused_payload_is_drained_and_the_next_frame_intact(address, make_peer, make_channel):
    choices = iter([None, [memoryview(bytearray(3))]])
    peer = make_peer(address, choose_buffers=lambda channel, header: next(choices))
    channel = make_channel(peer.address)
    channel.send("stale", 1, [memoryview(bytes(100_000))])
    channel.send("fresh", 2, [memoryview(b"abc")])
    peer.poll_until(lambda: len(peer.frames) == 2)
    stale, fresh = (frame for _, frame in peer.frames)
    assert (stale.body, stale.refused, stale.parts) == (1, True, [])
    assert (fresh.body, fresh.refused, bytes(fresh.parts[0])) == (2, False, b"abc")


@pytest.mark.parametrize(
    "error", [FrameMalformed("a bad field"), ChannelError("no such kind"), ValueError("a bug")]
)
@pytest.mark.parametrize("callback", ["on_frame", "choose_buffers"])
def test_a_callback_that_raises_costs_that_channel_alone(make_peer, make_channel, callback, error):
    def fail(channel, what):
        if channel.peer == "bad":
            raise error
        if callback == "on_frame":
            channel.send("answer")
        return [memoryview(bytearray(1))]

    peer = make_peer("tcp://127.0.0.1:0", **{callback: fail})
    bad, good = make_channel(peer.address, name="bad"), make_channel(peer.address)
    bad.send("ask", None, [memoryview(b"x")])
    peer.poll_until(lambda: peer.counts.refused_peers_count == 1)
    ends(bad)
    good.send("ask", None, [memoryview(b"x")])
    peer.poll_until(lambda: peer.counts.frames_count == (2 if callback == "on_frame" else 1))
    assert [channel.peer for channel in peer.closed] == ["bad"]


def test_an_answer_that_another_channel_refuses_does_not_cost_the_asker(make_peer, make_channel):
    gone = make_channel(make_peer("tcp://127.0.0.1:0").address)
    gone.close()
    seen = []

    def forward(channel, frame):
        seen.append(frame.body)
        gone.send("forwarded")

    peer = make_peer("tcp://127.0.0.1:0", on_frame=forward)
    channel = make_channel(peer.address)
    for number in range(3):
        channel.send("ask", number)
    peer.poll_until(lambda: len(seen) == 3)
    assert peer.closed == []


def test_an_end_that_cannot_be_handled_is_logged_and_no_more(make_peer, make_channel, caplog):
    def fail(channel):
        raise KeyError("no such request")

    peer = answering(make_peer, "tcp://127.0.0.1:0", on_closed=fail)
    leaving, staying = make_channel(peer.address), make_channel(peer.address)
    assert ask(peer, leaving, 1).body == 1
    leaving.close()
    peer.poll_until(lambda: "no such request" in caplog.text)
    assert ask(peer, staying, 2).body == 2


def test_a_slow_reader_is_served_to_the_end(address, make_peer, make_channel):
    payload = random.randbytes(1 << 20) * 16
    peer = make_peer(
        address, on_frame=lambda channel, frame: channel.send("large", None, [memoryview(payload)])
    )
    slow = make_channel(peer.address)
    slow.send("ask")
    peer.poll_until(lambda: any(channel.has_pending for channel in peer.endpoint._channels))
    other = make_channel(peer.address)
    other.send("ask")
    for channel in (other, slow):
        frames = []
        peer.poll_until(lambda channel=channel, frames=frames: receive_into(channel, frames))
        assert frames[0].parts[0] == payload
    peer.poll_until(lambda: not any(channel.has_pending for channel in peer.endpoint._channels))
    peer.endpoint.poll(0)
    watched = peer.endpoint._selector.get_map().values()
    assert {key.events for key in watched} == {selectors.EVENT_READ}  # room is no news any more


def receive_into(channel: StreamChannel, frames: list) -> list:
    frame = channel.receive_ready()
    if frame is not None:
        frames.append(frame)
    return frames


def test_a_peer_that_stops_reading_is_stalled_and_dropped(address, make_peer, make_channel):
    stalls = []

    def answer(channel, frame):
        channel.pending_bytes_max = 1 << 20
        try:
            channel.send("large", None, [memoryview(bytes(16 << 20))])
        except ChannelStalled as error:
            stalls.append(error)
            raise

    peer = make_peer(address, on_frame=answer)
    slow = make_channel(peer.address)
    slow.send("ask")
    slow.send("ask")
    peer.poll_until(lambda: peer.closed)
    assert len(stalls) == 1
    assert not peer.closed[0].has_pending
    ends(slow)


def test_what_a_sending_thread_leaves_is_sent_by_the_endpoint(address, make_peer):
    there = make_peer(address)
    here = make_peer("tcp://127.0.0.1:0")
    here.endpoint.start()
    channel = here.endpoint.connect(there.address)
    payload = random.randbytes(1 << 20) * 16
    for number in range(3):
        channel.send("latents", number, [memoryview(payload)])
    there.poll_until(lambda: len(there.frames) == 3)
    assert [frame.body for _, frame in there.frames] == [0, 1, 2]
    assert all(frame.parts[0] == payload for _, frame in there.frames)


def test_large_frames_both_ways_at_once_do_not_wait_for_each_other(address, make_peer):
    payloads = {"here": random.randbytes(1 << 20) * 64, "there": random.randbytes(1 << 20) * 64}
    arrived = {"here": bytearray(LARGE_BYTES), "there": bytearray(LARGE_BYTES)}
    came, greeted = queue.SimpleQueue(), queue.SimpleQueue()

    def make(name: str, where: str):
        def on_frame(channel, frame):
            (greeted if frame.kind == "hi" else came).put((name, channel))

        def choose(channel, header):
            return [memoryview(arrived[name])] if header.payload_bytes else []

        peer = make_peer(where, name=name, on_frame=on_frame, choose_buffers=choose)
        peer.endpoint.start()
        return peer

    here, there = make("here", "tcp://127.0.0.1:0"), make("there", address)
    down = here.endpoint.connect(there.address)
    down.send("hi")
    _, up = greeted.get(timeout=WAIT_S)
    down.send("large", None, [memoryview(payloads["here"])])
    up.send("large", None, [memoryview(payloads["there"])])
    assert {came.get(timeout=WAIT_S)[0] for _ in range(2)} == {"here", "there"}
    assert arrived["there"] == payloads["here"]
    assert arrived["here"] == payloads["there"]


def test_many_channels_at_once_are_all_served(address, make_peer, make_channel):
    peer = answering(make_peer, address)
    channels = [make_channel(peer.address, name=f"guest {number}") for number in range(60)]
    peer.endpoint.start()
    for turn in range(3):
        for number, channel in enumerate(channels):
            channel.send("ask", [turn, number], [memoryview(bytes([number]) * 5000)])
        for number, channel in enumerate(channels):
            frame = channel.receive(WAIT_S)
            assert frame.body == [turn, number]
            assert frame.parts[0] == bytes([number]) * 5000


def test_a_flood_of_frames_leaves_the_others_their_turn(make_peer, make_channel):
    peer = make_peer("tcp://127.0.0.1:0")
    flood, other = make_channel(peer.address, name="flood"), make_channel(peer.address, name="other")
    flood.send("first")
    other.send("first")
    peer.poll_until(lambda: len(peer.frames) == 2)
    frames_count = 3 * FRAMES_PER_TURN
    for number in range(frames_count):
        flood.send("flood", number)
    other.send("alone")
    while not any(frame.kind == "alone" for _, frame in peer.frames):
        assert peer.endpoint.poll(WAIT_S) <= FRAMES_PER_TURN + 1
    peer.poll_until(lambda: len(peer.frames) == 2 + frames_count + 1)
    assert [frame.body for _, frame in peer.frames if frame.kind == "flood"] == list(range(frames_count))


def test_a_wake_ends_a_wait_and_is_not_lost_before_it(make_peer):
    peer = make_peer("tcp://127.0.0.1:0")
    for _ in range(100_000):  # more than are kept
        peer.endpoint.wake()
    assert peer.endpoint.poll(1e6) == 0
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(peer.endpoint.poll, 1e6)
        peer.endpoint.wake()
        assert waiting.result(WAIT_S) == 0


def test_closing_from_another_thread_ends_the_poll(address, make_peer, make_channel):
    peer = answering(make_peer, address)
    channel = make_channel(peer.address)
    assert ask(peer, channel, 1).body == 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(peer.endpoint.poll, 1e6)
        peer.endpoint.close()
        assert waiting.result(WAIT_S) == 0
    ends(channel)
    assert peer.endpoint.poll(1e6) == 0
    peer.endpoint.wake()
    peer.endpoint.close()
    with pytest.raises(ChannelError):
        connect(peer.address, SECRET, "late")


def test_closing_amid_traffic_harms_nobody(address, make_peer, make_channel, caplog):
    peer = answering(make_peer, address)
    channels = [make_channel(peer.address) for _ in range(4)]
    peer.endpoint.start()
    go = threading.Event()

    def talk(channel: StreamChannel) -> None:
        while True:
            channel.send("ask", None, [memoryview(bytes(50_000))])
            channel.receive(WAIT_S)
            go.set()

    with ThreadPoolExecutor(4) as pool:
        talking = [pool.submit(talk, channel) for channel in channels]
        assert go.wait(WAIT_S)
        peer.endpoint.close()
        for talk_of in talking:
            with pytest.raises(ChannelError):
                talk_of.result(WAIT_S)
    assert warnings(caplog) == []


@pytest.mark.parametrize("threaded", [False, True])
def test_a_callback_may_close_its_endpoint(address, make_peer, make_channel, caplog, threaded):
    done = threading.Event()

    def close(channel, frame):
        if frame.kind == "close":
            peer.endpoint.close()
            done.set()

    peer = make_peer(address, on_frame=close)
    channel = make_channel(peer.address)
    channel.send("greet")
    peer.poll_until(lambda: peer.counts.frames_count)
    channel.send("close")
    channel.send("and no more")
    late = dial(peer.address, WAIT_S)
    peer.endpoint.wake()  # so that the turn has more to do after the callback
    if threaded:
        peer.endpoint.start()
        assert done.wait(WAIT_S)
        peer.endpoint._thread.join(WAIT_S)
    else:
        peer.poll_until(done.is_set)
    ends(channel)
    late.close()
    assert peer.counts.frames_count == 2
    assert warnings(caplog) == []


def test_a_callback_that_takes_long_is_not_waited_for_and_its_turn_tears_down(
    address, make_peer, make_channel, monkeypatch
):
    monkeypatch.setattr("kernels.transport.endpoint.CLOSE_TIMEOUT_S", 0.01)
    began, may_end = threading.Event(), threading.Event()

    def dawdle(channel, frame):
        began.set()
        may_end.wait(WAIT_S)

    peer = make_peer(address, on_frame=dawdle)
    channel = make_channel(peer.address)
    channel.send("ask")
    peer.endpoint.start()
    assert began.wait(WAIT_S)
    peer.endpoint.close()
    may_end.set()
    ends(channel)
    peer.endpoint._thread.join(WAIT_S)
    assert not peer.endpoint._thread.is_alive()
    with pytest.raises(ChannelError):
        connect(peer.address, SECRET, "late")


def test_closing_takes_along_who_has_only_just_come(address, make_peer, make_channel):
    peer = make_peer(address)
    channel = peer.endpoint.connect(peer.address)
    peer.endpoint.close()
    assert channel.fileno() == -1


def test_a_closed_endpoint_connects_nowhere(address, make_peer):
    there, here = make_peer(address), make_peer("tcp://127.0.0.1:0")
    here.endpoint.close()
    with pytest.raises(ChannelClosed, match="endpoint"):
        here.endpoint.connect(there.address)


def test_a_channel_closed_by_its_owner_is_let_go_by_the_endpoint(address, make_peer):
    there, here = make_peer(address), make_peer("tcp://127.0.0.1:0")
    early = here.endpoint.connect(there.address)
    early.close()  # before the endpoint has even seen it
    assert early.fileno() >= 0
    late = here.endpoint.connect(there.address)
    here.poll_until(lambda: late in here.endpoint._channels)
    late.close()
    here.poll_until(lambda: len(here.closed) == 2)
    assert (early.fileno(), late.fileno()) == (-1, -1)


def test_without_a_free_descriptor_peers_wait_for_better_times(make_peer, make_channel, caplog, monkeypatch):
    peer = answering(make_peer, "tcp://127.0.0.1:0", stall_s=STALL_S)
    known = make_channel(peer.address)
    assert ask(peer, known, 1).body == 1

    def none_free():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as scarce:
        scarce.setattr(peer.endpoint._listener, "accept", none_free)
        waiting = make_channel(peer.address)
        peer.poll_until(lambda: "cannot accept" in caplog.text)
        assert ask(peer, known, 2).body == 2
    assert ask(peer, waiting, 3).body == 3
    for _ in range(2):
        swept_s = peer.endpoint._swept_s
        peer.poll_until(lambda swept_s=swept_s: peer.endpoint._swept_s > swept_s)


def test_a_hundred_peers_leave_no_descriptor_behind(address, make_peer):
    peer = answering(make_peer, address)

    def visit(number: int) -> None:
        channel = connect(peer.address, SECRET, "guest")
        assert ask(peer, channel, number).body == number
        outgoing = peer.endpoint.connect(peer.address)
        peer.endpoint.poll(0)
        channel.close()
        outgoing.close()
        peer.poll_until(lambda: not peer.endpoint._channels)

    visit(0)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        visit(number)
    assert len(os.listdir("/proc/self/fd")) == before


def test_endpoints_leave_no_descriptor_behind(address, make_peer):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        peer = make_peer(address)
        channel = connect(peer.address, SECRET, "guest")
        peer.endpoint.poll(0)
        peer.endpoint.close()
        channel.close()
    assert len(os.listdir("/proc/self/fd")) == before
