"""The fence before the pages: what does not fit is never written, and no page is given away too early."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode.inbox import Inbox
from decode.messages import (
    AwaitPages,
    FirstToken,
    Latents,
    PageReservation,
    ReservationRefused,
    ReservePages,
    SamplingParameters,
    checksum,
)
from kernels.model.latent_cache import LatentCache, LatentLayout, slots_of
from kernels.model.pages import PAGE_TOKENS, PagesLost
from kernels.transport.tensors import as_bytes

LAYERS, DIM, PAGES, LEASE_S = 2, 4, 12, 10.0
TOKEN_BYTES = DIM * 4


@dataclass(eq=False)
class Wire:
    """A channel as the inbox knows it: something to tell from others."""

    peer: str = "prefill-0"
    is_quiet: bool = True


class Place:
    """An inbox over poisoned pages, its clock, and what prefill nodes do to it."""

    def __init__(self):
        self.now_s = 100.0
        layout = LatentLayout(DIM - 1, 1, torch.float32)
        self.cache = LatentCache(LAYERS, layout, PAGES * LAYERS * PAGE_TOKENS * TOKEN_BYTES)
        self.cache.latents.fill_(float("nan"))
        self.inbox = Inbox(self.cache, "memory://here", LEASE_S, lambda: self.now_s)
        self.gateway, self.prefill = Wire("gateway"), Wire()

    def reserve(self, request_id="r", tokens=100, outputs=20, generation=1, gateway=None):
        sampling = SamplingParameters(tokens_max=outputs)
        asked = ReservePages(request_id, generation, tuple(range(tokens)), tokens, sampling)
        return self.inbox.reserve(asked, gateway or self.gateway)

    def request(self, request_id="r"):
        return self.inbox._waiting[request_id]

    def begin(self, latents, request_id="r", generation=1, layer=0, begin=0, channel=None, **wrong):
        """A header arrives; the memory that its payload goes to, or None."""
        data = as_bytes(latents)
        header = Latents(
            request_id, generation, layer, begin, begin + len(latents), "float32", checksum([data])
        )
        size = wrong.pop("payload_bytes", data.nbytes)
        return self.inbox.choose_buffers(channel or self.prefill, replace(header, **wrong), size)

    def fill(self, views, latents):
        """The payload arrives, as a socket would write it."""
        data, offset = as_bytes(latents), 0
        for view in views:
            view[:] = data[offset : offset + view.nbytes]
            offset += view.nbytes
        assert offset == data.nbytes

    def bring(self, latents, channel=None, **header):
        """A whole frame arrives, which must fit."""
        self.fill(self.begin(latents, channel=channel, **header), latents)
        return self.inbox.received(channel or self.prefill)

    def bring_all(self, request_id="r", tokens=100, generation=1, channel=None):
        """All layers of a prompt arrive; the latents, layer by layer."""
        latents = torch.randn(LAYERS, tokens, DIM)
        for layer in range(LAYERS):
            header = {"request_id": request_id, "generation": generation, "layer": layer}
            assert self.bring(latents[layer], channel, **header) is None
        return latents

    def counts(self):
        pool = self.cache.pool
        self.inbox.check()
        return pool.pages_free_count, pool.pages_leased_count


@pytest.fixture
def place():
    return Place()


def test_pages_are_kept_for_the_prompt_and_all_its_outputs(place):
    answer = place.reserve(tokens=100, outputs=29)
    assert answer == PageReservation("r", 1, "memory://here")
    assert place.counts() == (PAGES - 3, 3)


def test_a_prompt_that_has_outputs_already_needs_no_more_pages_for_them(place):
    sampling = SamplingParameters(tokens_max=28)
    place.inbox.reserve(ReservePages("r", 2, tuple(range(120)), 100, sampling), place.gateway)
    assert place.counts() == (PAGES - 2, 2)


def test_no_room_is_said_with_numbers_and_changes_nothing(place):
    place.reserve("a", tokens=600, outputs=10)
    answer = place.reserve("b", tokens=100, outputs=100)
    assert answer == ReservationRefused("b", 1, pages_available_count=2)
    assert place.counts() == (2, 10)


def test_pages_that_a_request_waits_for_go_to_no_other_gateway(place):
    other = Wire("gateway-1")
    place.reserve("a", tokens=300, outputs=20)
    place.inbox.await_pages(AwaitPages("large", 10), place.gateway)
    assert place.reserve("small", gateway=other) == ReservationRefused("small", 1, pages_available_count=0)
    place.inbox.await_pages(AwaitPages("later", 11), other)
    place.inbox.cancel("a", 1)
    later = place.reserve("later", tokens=600, outputs=100, gateway=other)
    assert later == ReservationRefused("later", 1, pages_available_count=2)
    assert isinstance(place.reserve("small", gateway=other), PageReservation)
    assert isinstance(place.reserve("large", tokens=600, outputs=40), PageReservation)
    place.inbox.cancel("large", 1)
    assert isinstance(place.reserve("next", tokens=600, outputs=40, gateway=other), PageReservation)


def test_a_gateway_may_give_what_it_awaits_to_another_of_its_requests(place):
    other = Wire("gateway-1")
    place.inbox.await_pages(AwaitPages("large", 7), place.gateway)
    assert isinstance(place.reserve("urgent", tokens=300, outputs=20), PageReservation)
    assert isinstance(place.reserve("theirs", gateway=other), ReservationRefused), "large waits on"
    place.inbox.await_pages(AwaitPages("middle", 5), place.gateway)
    assert isinstance(place.reserve("theirs", gateway=other), PageReservation)


def test_a_cancelled_request_has_no_pages_kept_for_it(place):
    place.inbox.await_pages(AwaitPages("large", PAGES), place.gateway)
    place.inbox.cancel("another", 1)
    assert isinstance(place.reserve(gateway=Wire("gateway-1")), ReservationRefused)
    assert not place.inbox.cancel("large", 0)
    assert isinstance(place.reserve(gateway=Wire("gateway-1")), PageReservation)


@pytest.mark.parametrize("end", ["time", "gateway gone"])
def test_nothing_waits_for_one_who_asks_no_more(place, end):
    place.inbox.await_pages(AwaitPages("large", 10), place.gateway)
    place.now_s += LEASE_S / 2
    other = Wire("gateway-1")
    assert isinstance(place.reserve(tokens=300, gateway=other), ReservationRefused)
    if end == "time":
        place.now_s += 0.1
    else:
        place.inbox.await_pages(AwaitPages("large", 10), place.gateway)
        place.inbox.cancel_of(other)
        assert isinstance(place.reserve(tokens=300, gateway=other), ReservationRefused)
        place.inbox.cancel_of(place.gateway)
    assert isinstance(place.reserve(tokens=300, gateway=other), PageReservation)


def test_a_newer_generation_replaces_an_older_one(place):
    place.reserve(generation=1)
    assert isinstance(place.reserve(generation=2, tokens=300), PageReservation)
    assert place.counts() == (PAGES - 5, 5)
    assert place.request().asked.generation == 2


def test_a_belated_older_generation_is_refused_and_costs_no_page(place):
    place.reserve(generation=3)
    assert isinstance(place.reserve(generation=2), ReservationRefused)
    assert place.request().asked.generation == 3
    assert place.counts() == (PAGES - 2, 2)


def test_latents_land_in_their_slots_and_nowhere_else(place):
    place.reserve("other")
    place.reserve(tokens=200)
    latents = place.bring_all(tokens=200)
    pages = place.request().pages
    for layer in range(LAYERS):
        assert torch.equal(place.cache.read(layer, slots_of(pages, 0, 200)), latents[layer])
    assert torch.isfinite(place.cache.latents).all(dim=-1).sum() == LAYERS * 200, "poison was overwritten"


def test_chunks_follow_each_other_across_pages_that_are_no_row(place):
    for name in "abcdef":
        place.reserve(name, tokens=100, outputs=20)
    for name in "ace":
        place.inbox.cancel(name, 1)
    place.reserve(tokens=300)
    pages = place.request().pages
    latents = torch.randn(300, DIM)
    for begin, end in ((0, 64), (64, 256), (256, 300)):
        assert place.bring(latents[begin:end], begin=begin) is None
    assert torch.equal(place.cache.read(0, slots_of(pages, 0, 300)), latents)


MISFITS = {
    "an unknown request": {"request_id": "nobody"},
    "an older generation": {"generation": 1},
    "a newer generation": {"generation": 3},
    "a layer that is not there": {"layer": LAYERS},
    "a negative layer": {"layer": -1},
    "another layer's turn": {"layer": 1},
    "a gap": {"begin": 65, "end": 129},
    "a repetition": {"begin": 0, "end": 64},
    "a negative begin": {"begin": -64, "end": 0},
    "an end beyond the prompt": {"end": 101, "payload_bytes": 37 * TOKEN_BYTES},
    "an empty span": {"end": 64, "payload_bytes": 0},
    "a span that ends before it begins": {"end": 60, "payload_bytes": 0},
    "another dtype": {"dtype": "bfloat16"},
    "an unknown dtype": {"dtype": "float7"},
    "a byte too few": {"payload_bytes": 36 * TOKEN_BYTES - 1},
    "a token too many": {"payload_bytes": 37 * TOKEN_BYTES},
    "another prefill node": {"channel": Wire("prefill-1")},
}


@pytest.mark.parametrize("wrong", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_counted_and_not_written(place, wrong):
    place.reserve(generation=2)
    place.bring(torch.ones(64, DIM), generation=2)
    before = place.cache.latents.nan_to_num(7.0)
    header = {"generation": 2, "begin": 64, "end": 100} | wrong
    assert place.begin(torch.zeros(36, DIM), **header) is None
    assert place.inbox.refused_count == 1
    assert torch.equal(place.cache.latents.nan_to_num(7.0), before)
    assert place.request().latents_counts == [64, 0]
    place.bring(torch.zeros(36, DIM), generation=2, begin=64)
    assert place.request().latents_counts == [100, 0]


def test_damaged_bytes_end_the_request_and_free_its_pages(place):
    place.reserve()
    latents = torch.randn(64, DIM)
    views = place.begin(latents)
    place.fill(views, latents)
    views[0][17] ^= 4
    damaged = place.inbox.received(place.prefill)
    assert damaged.asked.request_id == "r"
    assert (len(place.inbox), place.inbox.refused_count) == (0, 1)
    assert place.counts() == (PAGES, 0)


def test_a_complete_request_is_handed_over_once_with_its_pages(place):
    place.reserve()
    place.bring_all()
    assert place.inbox.take_complete() == []
    request = place.inbox.first_token(FirstToken("r", 1, 77))
    assert (request.is_complete, request.cancelled) == (True, False)
    assert place.inbox.take_complete() == [request]
    assert place.inbox.take_complete() == []
    assert (request.token_ids[-1], request.position, request.outputs_count) == (77, 100, 1)
    assert place.counts() == (PAGES - 2, 2)
    place.inbox.release(request)
    assert place.counts() == (PAGES, 0)


def test_complete_requests_come_in_the_order_of_their_reservations(place):
    for name in "abc":
        place.reserve(name)
    for name in "cab":
        place.bring_all(name)
        place.inbox.first_token(FirstToken(name, 1, 5))
    assert [request.asked.request_id for request in place.inbox.take_complete()] == ["a", "b", "c"]


@pytest.mark.parametrize("first", [FirstToken("r", 0, 5), FirstToken("r", 2, 5), FirstToken("x", 1, 5)])
def test_a_first_token_that_fits_nothing_is_refused(place, first):
    place.reserve()
    place.bring_all()
    assert place.inbox.first_token(first) is None
    assert place.inbox.refused_count == 1
    assert not place.request().first_token_known


def test_a_second_first_token_is_refused(place):
    place.reserve()
    place.bring_all()
    place.inbox.first_token(FirstToken("r", 1, 5))
    assert place.inbox.first_token(FirstToken("r", 1, 6)) is None
    assert place.request().token_ids[-1] == 5


def test_a_first_token_without_all_latents_ends_the_request(place):
    """It is the last word of prefill: what is missing now would be waited for without end."""
    place.reserve()
    place.bring(torch.randn(100, DIM), layer=0)
    place.bring(torch.randn(99, DIM), layer=1)
    request = place.inbox.first_token(FirstToken("r", 1, 5))
    assert request.cancelled
    assert len(place.inbox) == 0
    assert place.counts() == (PAGES, 0)


@pytest.mark.parametrize("end", ["received", "damaged", "channel_closed"])
@pytest.mark.parametrize("cause", ["cancel", "gateway gone", "lease", "newer generation"])
def test_pages_that_a_frame_is_written_to_are_kept_until_it_ends(place, cause, end):
    place.reserve()
    pages = place.request().pages
    latents = torch.randn(64, DIM)
    views = place.begin(latents)
    match cause:
        case "cancel":
            assert place.inbox.cancel("r", 1)
        case "gateway gone":
            place.inbox.cancel_of(place.gateway)
        case "lease":
            place.now_s += LEASE_S + 1
            assert len(place.inbox.sweep()) == 1
        case "newer generation":
            place.reserve(generation=2)
            assert not set(place.request().pages) & set(pages)
            assert place.inbox.cancel("r", 2)
    assert place.counts() == (PAGES - 2, 2), "pages were given away under a frame"
    place.reserve("next", tokens=64 * (PAGES - 2) - 20)
    assert not set(place.request("next").pages) & set(pages)
    if end == "channel_closed":
        assert place.inbox.channel_closed(place.prefill) == []
    else:
        place.fill(views, latents)
        if end == "damaged":
            views[0][0] ^= 1
        assert place.inbox.received(place.prefill) is None
    assert place.counts() == (2, PAGES - 2)
    assert place.begin(latents, begin=64) is None, "a request that is over took another frame"


@pytest.mark.parametrize("cancelled", [False, True])
def test_pages_that_a_gpu_may_still_write_to_are_not_given_away(place, cancelled, caplog):
    place.reserve()
    place.reserve("other")
    kept = set(place.request().pages)
    place.begin(torch.randn(64, DIM))
    if cancelled:
        place.inbox.cancel("r", 1)
    place.prefill.is_quiet = False
    lost = place.inbox.channel_closed(place.prefill)
    assert [request.asked.request_id for request in lost] == ([] if cancelled else ["r"])
    assert "2 pages of r stay leased" in caplog.text
    assert place.inbox.sweep() == []
    place.inbox.cancel("other", 1)
    assert (place.counts(), place.inbox.pages_count) == ((PAGES - 2, 2), 0)
    place.reserve("next", tokens=64 * (PAGES - 2) - 20)
    assert not set(place.request("next").pages) & kept
    assert place.inbox.channel_closed(place.prefill) == []
    assert place.counts() == (0, PAGES)
    place.prefill.is_quiet = True
    for _ in range(2):
        assert place.inbox.sweep() == []
        assert place.counts() == (2, PAGES - 2), "the GPU has let go of them"


def test_a_node_that_gpus_hold_many_pages_of_leaves(place):
    place.reserve(tokens=64, outputs=1)
    place.begin(torch.randn(64, DIM))
    place.prefill.is_quiet = False
    place.inbox.channel_closed(place.prefill)
    place.inbox.check_stranded()
    place.now_s += LEASE_S + 1
    with pytest.raises(PagesLost, match="other GPUs may still write to 2 pages"):
        place.inbox.check_stranded()
    place.prefill.is_quiet = True
    place.inbox.sweep()
    place.inbox.check_stranded()


def test_a_channel_that_is_not_quiet_keeps_no_pages_between_frames(place):
    place.reserve()
    place.bring(torch.randn(64, DIM))
    place.prefill.is_quiet = False
    assert len(place.inbox.channel_closed(place.prefill)) == 1
    assert place.counts() == (PAGES, 0)


def test_cancel_of_an_older_generation_is_not_heard(place):
    place.reserve(generation=2)
    assert not place.inbox.cancel("r", 1)
    assert not place.inbox.cancel("nobody", 1)
    assert len(place.inbox) == 1
    assert place.inbox.cancel("r", 2)
    assert place.counts() == (PAGES, 0)


def test_a_gateway_that_goes_takes_its_own_requests_along(place):
    other = Wire("gateway-1")
    place.reserve("mine")
    place.reserve("theirs", gateway=other)
    place.inbox.cancel_of(other)
    assert list(place.inbox._waiting) == ["mine"]
    assert place.counts() == (PAGES - 2, 2)


def test_a_prefill_node_that_goes_ends_what_it_has_not_finished(place):
    other = Wire("prefill-1")
    for name in ("half", "whole", "untouched", "by other"):
        place.reserve(name)
    place.bring(torch.randn(64, DIM), request_id="half")
    place.bring_all("whole")
    place.inbox.first_token(FirstToken("whole", 1, 5))
    place.bring(torch.randn(64, DIM), request_id="by other", channel=other)
    lost = place.inbox.channel_closed(place.prefill)
    assert [request.asked.request_id for request in lost] == ["half"]
    assert list(place.inbox._waiting) == ["whole", "untouched", "by other"]
    assert place.counts() == (PAGES - 6, 6)


def test_leases_end_unless_extended_or_fed(place):
    for name in ("extended", "fed", "forgotten"):
        place.reserve(name)
    place.now_s += LEASE_S - 1
    assert place.inbox.sweep() == []
    place.inbox.extend(["extended", "nobody"])
    place.bring(torch.randn(64, DIM), request_id="fed")
    place.now_s += 2
    assert [request.asked.request_id for request in place.inbox.sweep()] == ["forgotten"]
    assert sorted(place.inbox._waiting) == ["extended", "fed"]
    place.now_s += LEASE_S
    assert len(place.inbox.sweep()) == 2
    assert place.counts() == (PAGES, 0)


class InboxStory(RuleBasedStateMachine):
    """Gateways and prefill nodes come, send half a frame, and go, in any order; no page has two owners."""

    names = st.sampled_from(["a", "b", "c"])
    channels = st.integers(0, 1)

    def __init__(self):
        super().__init__()
        self.place = Place()
        self.wires = [Wire("0"), Wire("1")]
        self.half: dict[int, tuple[list, torch.Tensor, set[int]]] = {}
        self.running: list = []
        self.kept: list[tuple[Wire, set[int]]] = []
        self.generations = dict.fromkeys("abc", 0)

    @rule(name=names, tokens=st.integers(1, 150), gateway=channels)
    def reserve(self, name, tokens, gateway):
        self.generations[name] += 1
        self.place.reserve(name, tokens, 20, self.generations[name], self.wires[gateway])

    @rule(name=names, wire=channels, layer=st.integers(0, LAYERS - 1), tokens=st.integers(1, 150))
    def begin(self, name, wire, layer, tokens):
        request = self.place.inbox._waiting.get(name)
        if wire in self.half or request is None:
            return
        begin = request.latents_counts[layer]
        latents = torch.full((min(tokens, max(len(request.asked.token_ids) - begin, 1)), DIM), float(tokens))
        header = {"generation": self.generations[name], "layer": layer, "begin": begin}
        views = self.place.begin(latents, name, channel=self.wires[wire], **header)
        if views is not None:
            self.half[wire] = views, latents, set(request.pages)

    @precondition(lambda self: self.half)
    @rule(wire=channels, damaged=st.booleans())
    def finish(self, wire, damaged):
        if wire in self.half:
            views, latents, _ = self.half.pop(wire)
            self.place.fill(views, latents)
            if damaged:
                views[0][0] ^= 1
            self.place.inbox.received(self.wires[wire])

    @rule(name=names)
    def first_token(self, name):
        self.place.inbox.first_token(FirstToken(name, self.generations[name], 3))

    @rule()
    def take(self):
        self.running += self.place.inbox.take_complete()

    @precondition(lambda self: self.running)
    @rule()
    def release(self):
        self.place.inbox.release(self.running.pop())

    @rule(name=names, back=st.integers(0, 1))
    def cancel(self, name, back):
        self.place.inbox.cancel(name, self.generations[name] - back)

    @rule(wire=channels, quiet=st.booleans())
    def close(self, wire, quiet):
        self.wires[wire].is_quiet = quiet
        if wire in self.half and not quiet:
            self.kept.append((self.wires[wire], self.half[wire][2]))
        self.half.pop(wire, None)
        self.place.inbox.channel_closed(self.wires[wire])
        self.place.inbox.cancel_of(self.wires[wire])
        self.wires[wire] = Wire(str(wire))

    @precondition(lambda self: self.kept)
    @rule()
    def let_go(self):
        self.kept[0][0].is_quiet = True

    @rule(seconds=st.sampled_from([1.0, LEASE_S + 1]))
    def sweep(self, seconds):
        self.place.now_s += seconds
        self.place.inbox.sweep()
        self.kept = [(wire, pages) for wire, pages in self.kept if not wire.is_quiet]

    @invariant()
    def every_page_has_just_its_owners(self):
        self.place.inbox.check()
        waiting = [set(request.pages) for request in self.place.inbox._waiting.values()]
        running = [set(request.pages) for request in self.running]
        writing = [pages for _, _, pages in self.half.values()]
        kept = [pages for _, pages in self.kept]
        distinct = waiting + running + kept + [pages for pages in writing if pages not in waiting]
        assert sum(map(len, distinct)) == len(set().union(*distinct)), "a page has two owners"
        assert self.place.cache.pool.pages_leased_count == len(set().union(*distinct))


InboxStory.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestInboxStory = InboxStory.TestCase
