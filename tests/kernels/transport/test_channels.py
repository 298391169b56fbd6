"""One suite over every scheme: frames, memory, closing, timeouts."""

import random
import select
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernels.transport.errors import (
    ChannelClosed,
    ChannelStalled,
    ChannelTimeout,
    FrameMalformed,
    FrameTooLarge,
    FrameTruncated,
)
from kernels.transport.frame import HELLO, MAGIC, PREFIX, FrameLimits, encode
from kernels.transport.stream import VECTORS_MAX, StreamChannel
from tests.kernels.transport.conftest import SECRET, WAIT_S, accept

MANY_BYTES = 32 << 20  # more than any socket takes at once
SOON_S = 0.05


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


def wait_readable(channel: StreamChannel) -> None:
    assert select.select([channel], [], [], WAIT_S)[0]


def joined(parts) -> bytes:
    return b"".join(parts)


def test_frames_cross_both_ways_in_order(pair):
    for number in range(50):
        pair.here.send("down", [number, "é", None, 1.5, b"raw", {"key": True}])
        pair.there.send("up", number)
    for number in range(50):
        down, up = pair.there.receive(WAIT_S), pair.here.receive(WAIT_S)
        assert (down.kind, down.body) == ("down", [number, "é", None, 1.5, b"raw", {"key": True}])
        assert (up.kind, up.body, up.parts) == ("up", number, [])
    assert pair.here.receive_ready() is None


def test_the_hello_names_the_peer(pair):
    assert pair.there.peer == "here"


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], [1], [5, 0, 70_000, 0, 3], [3] * (2 * VECTORS_MAX + 7)])
def test_parts_arrive_as_they_were(pair, sizes):
    parts = [random.randbytes(size) for size in sizes]
    pair.here.send("parts", len(parts), views(*parts))
    pair.here.send("next")
    frame = pair.there.receive(WAIT_S)
    assert [bytes(part) for part in frame.parts] == parts
    assert pair.there.receive(WAIT_S).kind == "next"


def test_bytes_of_other_formats_cross_whole(pair):
    numbers = memoryview(bytearray(random.randbytes(800_000))).cast("d").cast("B").cast("d", (100, 1000))
    pair.here.send("numbers", None, [numbers])
    target = bytearray(numbers.nbytes)
    answered(pair, lambda header: [memoryview(target).cast("I")])
    assert target == numbers.tobytes()


def answered(pair, choose):
    """Receive one frame while its sender pushes what is left of it."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(pair.here.flush, WAIT_S)
        frame = pair.there.receive(WAIT_S, choose)
        flushed.result()
    return frame


@pytest.mark.parametrize("sizes", [[300_000], [1, 0, 299_999], [0, 150_000, 0, 150_000, 0], [100] * 3000])
def test_a_payload_goes_straight_into_the_memory_chosen(pair, sizes):
    payload = random.randbytes(300_000)
    whole = bytearray(b"\xaa" * 300_016)
    cut, chosen, seen = 8, [], []
    for size in sizes:
        chosen.append(memoryview(whole)[cut : cut + size])
        cut += size
    pair.here.send("latents", {"layer": 3}, views(payload[:1000], payload[1000:]))
    frame = answered(pair, lambda header: seen.append(header) or chosen)
    assert (seen[0].kind, seen[0].body, seen[0].part_sizes) == ("latents", {"layer": 3}, (1000, 299_000))
    assert whole[8:-8] == payload
    assert whole[:8] == whole[-8:] == b"\xaa" * 8
    assert not frame.refused
    assert joined(frame.parts) == payload


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 1_000_000])
def test_a_refused_payload_is_drained_and_the_next_frame_intact(pair, size):
    pair.here.send("unwanted", 1, views(bytes(size)))
    pair.here.send("wanted", 2, views(b"intact"))
    refused = answered(pair, lambda header: None)
    assert (refused.kind, refused.body, refused.parts, refused.refused) == ("unwanted", 1, [], True)
    wanted = pair.there.receive(WAIT_S)
    assert (wanted.body, joined(wanted.parts), wanted.refused) == (2, b"intact", False)


@pytest.mark.parametrize("chosen_bytes", [0, 9, 11])
def test_memory_of_another_size_ends_the_channel(pair, chosen_bytes):
    pair.here.send("ten", None, views(bytes(10)))
    with pytest.raises(FrameMalformed, match="memory chosen"):
        pair.there.receive(WAIT_S, lambda header: [memoryview(bytearray(chosen_bytes))])
    with pytest.raises(ChannelClosed):
        pair.there.receive(WAIT_S)


def test_a_choice_that_fails_ends_the_channel_before_the_payload_is_taken_for_a_frame(pair):
    inner = encode("forged", None, [])
    pair.here.send("outer", None, views(inner))
    with pytest.raises(KeyError):
        pair.there.receive(WAIT_S, lambda header: {}["no such page"])
    with pytest.raises(ChannelClosed):
        pair.there.receive_ready()
    with pytest.raises(ChannelClosed):
        pair.here.receive(WAIT_S)


def test_a_peer_that_leaves_between_frames_is_closed_and_what_it_said_is_read(pair):
    pair.here.send("last", None, views(b"words"))
    pair.here.close()
    assert joined(pair.there.receive(WAIT_S).parts) == b"words"
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            pair.there.receive(WAIT_S)
    with pytest.raises(ChannelClosed):
        pair.there.send("more")


def test_what_was_said_is_still_read_after_sending_has_failed(listener, pair):
    pair.here.send("last", None, views(b"words"))
    pair.here.close()
    with pytest.raises(ChannelClosed):
        for _ in range(1000):
            pair.there.send("to nobody", None, views(bytes(100_000)))
    assert not pair.there.has_pending
    if not listener.address.startswith("tcp"):  # a TCP peer that leaves with bytes unread resets the channel
        assert joined(pair.there.receive(WAIT_S).parts) == b"words"


@pytest.mark.parametrize("kept", [1, PREFIX.size - 1, PREFIX.size, PREFIX.size + 3, -1])
def test_a_peer_that_leaves_inside_a_frame_is_truncated(stranger, kept):
    sock, channel = stranger
    sock.sendall((encode("half", None, views(bytes(10))) + bytes(10))[:kept])
    assert channel.receive_ready() is None
    sock.close()
    with pytest.raises(FrameTruncated):
        channel.receive(WAIT_S)


def test_a_frame_that_comes_byte_by_byte_is_whole_at_the_last(stranger):
    sock, channel = stranger
    data = encode("slow", [1], views(b"abc", b"", b"de")) + b"abcde"
    for cut in range(len(data)):
        assert channel.receive_ready() is None
        assert channel.reader.inside_frame == (cut > 0)
        sock.sendall(data[cut : cut + 1])
        wait_readable(channel)
    frame = channel.receive_ready()
    assert (frame.kind, frame.body, [bytes(part) for part in frame.parts]) == (
        "slow",
        [1],
        [b"abc", b"", b"de"],
    )
    assert not channel.reader.inside_frame


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", FrameMalformed),
        (PREFIX.pack(MAGIC, 101, 0), FrameTooLarge),
        (PREFIX.pack(MAGIC, 1, 1001), FrameTooLarge),
        (PREFIX.pack(MAGIC, 4, 0) + b"\xc1\xc1\xc1\xc1", FrameMalformed),
        (PREFIX.pack(MAGIC, 0, 0), FrameMalformed),
    ],
)
def test_bytes_that_are_no_frame_end_the_channel(stranger, data, error):
    sock, channel = stranger
    channel.reader.limits = FrameLimits(header_bytes_max=100, payload_bytes_max=1000)
    sock.sendall(data)
    with pytest.raises(error):
        channel.receive(WAIT_S)
    with pytest.raises(ChannelClosed):
        channel.receive(WAIT_S)
    assert sock.recv(1) == b""


def test_a_timeout_loses_nothing(stranger):
    sock, channel = stranger
    data = encode("late", 5, views(b"abc")) + b"abc"
    with pytest.raises(ChannelTimeout):
        channel.receive(0.0)
    sock.sendall(data[:-2])
    with pytest.raises(ChannelTimeout):
        channel.receive(SOON_S)
    sock.sendall(data[-2:])
    frame = channel.receive(WAIT_S)
    assert (frame.body, joined(frame.parts)) == (5, b"abc")


def test_what_is_here_is_received_without_any_time(pair):
    pair.here.send("here")
    wait_readable(pair.there)
    assert pair.there.receive(0.0).kind == "here"


def test_a_slow_reader_leaves_bytes_pending_until_it_reads(pair):
    payload = random.randbytes(1 << 20) * (MANY_BYTES >> 20)
    pair.here.send("large", None, views(payload))
    assert pair.here.has_pending
    assert 0 < pair.here.pending_bytes < MANY_BYTES + 4096
    assert not pair.here.push()
    with pytest.raises(ChannelTimeout):
        pair.here.flush(SOON_S)
    frame = answered(pair, None)
    assert joined(frame.parts) == payload
    assert pair.here.push()
    assert not pair.here.has_pending
    assert pair.here.pending_bytes == 0


def test_who_waits_for_the_answer_sends_the_rest_of_the_question(pair):
    pair.here.send("question", None, views(bytes(MANY_BYTES)))
    assert pair.here.has_pending
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pair.here.receive, WAIT_S)
        pair.there.receive(WAIT_S)
        pair.there.send("answer")
        assert waiting.result().kind == "answer"


def test_a_peer_that_stops_reading_is_stalled_and_its_bytes_let_go(pair):
    pair.here.pending_bytes_max = 1 << 20
    pair.here.send("larger than the limit, and allowed alone", None, views(bytes(MANY_BYTES)))
    with pytest.raises(ChannelStalled, match="bytes wait"):
        pair.here.send("one more")
    assert not pair.here.has_pending
    assert pair.here.fileno() >= 0
    for use in (lambda: pair.here.send("again"), pair.here.push, pair.here.receive_ready):
        with pytest.raises(ChannelClosed):
            use()
    with pytest.raises(FrameTruncated):
        pair.there.receive(WAIT_S)


def test_large_frames_both_ways_at_once_do_not_wait_for_each_other(pair):
    down, up = random.randbytes(1 << 20) * 64, random.randbytes(1 << 20) * 64

    def exchange(channel: StreamChannel, payload: bytes) -> bytearray:
        target = bytearray(len(payload))
        channel.send("large", None, views(payload))
        channel.receive(WAIT_S, lambda header: [memoryview(target)])
        channel.flush(WAIT_S)
        return target

    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(exchange, pair.there, up)
        assert exchange(pair.here, down) == up
        assert theirs.result() == down


def test_frames_of_many_threads_stay_whole(pair):
    threads_count, frames_count = 4, 50

    def send(thread: int) -> None:
        for number in range(frames_count):
            pair.here.send("one of many", [thread, number], views(bytes([thread]) * 20_000))
        pair.here.flush(WAIT_S)

    seen = {thread: [] for thread in range(threads_count)}
    with ThreadPoolExecutor(threads_count) as pool:
        done = [pool.submit(send, thread) for thread in range(threads_count)]
        for _ in range(threads_count * frames_count):
            frame = pair.there.receive(WAIT_S)
            thread, number = frame.body
            seen[thread].append(number)
            assert joined(frame.parts) == bytes([thread]) * 20_000
        for sent in done:
            sent.result()
    assert all(numbers == list(range(frames_count)) for numbers in seen.values())


@pytest.mark.parametrize("waits", ["receive", "flush"])
def test_closing_wakes_who_waits_and_takes_the_descriptor_after_it(pair, waits):
    inside = threading.Event()
    channel = pair.here
    if waits == "flush":
        channel.send("large", None, views(bytes(MANY_BYTES)))
    wait, channel._wait = channel._wait, lambda *which: inside.set() or wait(*which)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getattr(channel, waits), WAIT_S)
        assert inside.wait(WAIT_S)
        channel.close()
        with pytest.raises(ChannelClosed):
            waiting.result(WAIT_S)
    assert channel.fileno() == -1


def test_a_descriptor_in_use_outlives_closing(pair):
    pair.there.send("frame", None, views(b"abc"))
    kept = []

    def close_meanwhile(header):
        pair.here.close()
        kept.append(pair.here.fileno())
        return [memoryview(bytearray(3))]

    try:
        pair.here.receive(WAIT_S, close_meanwhile)
    except ChannelClosed:
        pass  # the bytes were not all here when it was closed
    assert kept[0] >= 0
    assert pair.here.fileno() == -1


def test_closing_twice_does_nothing_more(pair):
    pair.here.close()
    pair.here.close()
    assert pair.here.fileno() == -1
    for use in (lambda: pair.here.send("late"), pair.here.push, pair.here.receive_ready):
        with pytest.raises(ChannelClosed):
            use()


def test_the_descriptor_stays_after_an_error_until_it_is_closed(pair):
    number = pair.there.fileno()
    pair.here.close()
    with pytest.raises(ChannelClosed):
        pair.there.receive(WAIT_S)
    assert pair.there.fileno() == number
    pair.there.close()
    assert pair.there.fileno() == -1


def test_a_body_that_cannot_be_packed_leaves_the_channel_as_it_was(pair):
    with pytest.raises(TypeError):
        pair.here.send("kind", object())
    with pytest.raises(TypeError):
        pair.here.send("kind", None, [memoryview(bytes(8))[::2]])
    pair.here.send("well", None)
    assert pair.there.receive(WAIT_S).kind == "well"


def test_many_peers_wait_to_be_accepted(listener, make_channel):
    channels = [make_channel(listener.address, name=f"guest {number}") for number in range(100)]
    accepted = [accept(listener) for _ in channels]
    names = {channel.receive(WAIT_S).body["name"] for channel in accepted}
    assert names == {f"guest {number}" for number in range(100)}
    assert listener.accept() is None
    for channel in accepted:
        channel.close()


def test_a_hello_is_the_first_frame(listener, make_channel):
    make_channel(listener.address, name="me")
    channel = accept(listener)
    hello = channel.receive(WAIT_S)
    channel.close()
    assert (hello.kind, hello.body) == (HELLO, {"version": 1, "secret": SECRET, "name": "me"})
