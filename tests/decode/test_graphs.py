"""Recorded lanes give what lanes give: for other requests, fewer, longer ones, side by side."""

from types import SimpleNamespace

import pytest
import torch

from decode import step
from decode.graphs import CudaRecorder, GraphedLanes, RecordedExperts, RecordingStuck
from decode.messages import ReservePages, SamplingParameters
from decode.request import DecodeRequest
from decode.step import DecodeStep, lane_sizes
from decode.step_inputs import StepInputs, bucket_of
from experts.banked import BankedExperts
from experts.local import LocalExperts
from kernels.model.checkpoint import Checkpoint
from kernels.model.latent_cache import LatentCache
from kernels.model.pages import PAGE_TOKENS, pages_for
from kernels.model.transformer import Transformer, run_lanes
from kernels.ops.backend import kernels_forced
from tests.decode.replaying import ReplayingRecorder

PAGES_COUNT = 40


class Afar:
    """Experts that are elsewhere: what they answer is new memory each time, and they count their calls."""

    is_recordable = False

    def __init__(self, experts: LocalExperts | BankedExperts):
        self.experts = experts
        self.tokens_counts: list[int] = []
        self.places: set[tuple[int, ...]] = set()

    def dispatch(self, layer, hidden, expert_ids, expert_weights):
        """As the socket has it."""
        self.tokens_counts.append(len(hidden))
        self.places.add(tuple(part.data_ptr() for part in (hidden, expert_ids, expert_weights)))
        return self.experts.dispatch(layer, hidden.clone(), expert_ids.clone(), expert_weights.clone())


def random_cache(transformer: Transformer) -> LatentCache:
    """Latents of everything, at random."""
    layout, layers_count = transformer.latent_layout(False), transformer.config.layers_count
    page_bytes = layers_count * PAGE_TOKENS * layout.row_bytes
    cache = LatentCache(layers_count, layout, PAGES_COUNT * page_bytes, transformer.device)
    cache.latents.normal_()
    return cache


@pytest.fixture
def cache(transformer) -> LatentCache:
    """Of the tiny model on a CPU."""
    return random_cache(transformer)


def drawn_requests(cache: LatentCache, *lengths: int) -> list[DecodeRequest]:
    """Requests with so many tokens, the newest without a latent."""
    requests = []
    for number, length in enumerate(lengths):
        token_ids = torch.randint(2, 512, (length,)).tolist()
        pages = cache.pool.lease(-(-(length + 1) // PAGE_TOKENS))
        asked = ReservePages(f"r{number}", 1, tuple(token_ids), length, SamplingParameters())
        request = DecodeRequest(asked, None, pages, 0.0, [], list(token_ids))
        request.page_table = torch.tensor(pages, dtype=torch.int32)
        requests.append(request)
    return requests


def assert_plays_as_computed(plain: DecodeStep, recorded: DecodeStep, *lengths: int) -> None:
    """A step of requests with so many tokens gives and writes the same, however it is made."""
    cache = plain.cache
    requests = drawn_requests(cache, *lengths)
    before = cache.latents.clone()
    expected, written = plain.run(requests), cache.latents.clone()
    cache.latents.copy_(before)
    assert torch.equal(recorded.run(requests), expected)
    assert torch.equal(cache.latents, written)


@pytest.mark.parametrize("is_far", [False, True], ids=["experts here", "experts elsewhere"])
def test_a_recorded_step_is_the_step_for_any_requests_of_its_size(transformer, cache, is_far):
    local = transformer.routed
    routed = Afar(local) if is_far else local
    plugged = transformer.plugged_into(routed)
    plain = DecodeStep(plugged, cache, 1)
    recorded = DecodeStep(plugged, cache, 1, ReplayingRecorder)
    with kernels_forced():
        recorded._graphs.prepare([(0, 4)], plugged.device)
        for lengths in ((70, 3, 130), (5, 1, 128, 200)):
            assert_plays_as_computed(plain, recorded, *lengths)
    assert len(recorded._graphs._tapes) == 1
    if is_far:
        assert set(routed.tokens_counts) == {3, 4}, "nobody sends what only fills a recorded size"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's recordings need one")
def test_sizes_recorded_by_a_gpu_are_the_step_as_they_play_in_turn(checkpoint_folder, device):
    checkpoint = Checkpoint(checkpoint_folder)
    experts = Afar(BankedExperts.from_checkpoint(checkpoint, torch.float32, None, device))
    transformer = Transformer.from_checkpoint(checkpoint, torch.float32, experts, device=device)
    cache = random_cache(transformer)
    plain, recorded = DecodeStep(transformer, cache, 1), DecodeStep(transformer, cache, 1, CudaRecorder)
    assert recorded.prepare([2, 4])
    for lengths in ((70, 3, 130, 9), (5, 1), (12, 128, 20), (64, 65)):
        assert_plays_as_computed(plain, recorded, *lengths)
    assert {size for _, size, _ in recorded._graphs._tapes} == {2, 4}


def test_lanes_side_by_side_do_not_share_what_they_write(transformer, cache, monkeypatch):
    monkeypatch.setattr(step, "LANE_REQUESTS_MIN", 4)
    plugged = transformer.plugged_into(Afar(transformer.routed))
    plain, recorded = DecodeStep(plugged, cache, 2), DecodeStep(plugged, cache, 2, ReplayingRecorder)
    with kernels_forced():
        recorded._graphs.prepare([(1, 4), (0, 4)], plugged.device)
        requests = drawn_requests(cache, *range(40, 48))
        expected = plain.run(requests)
        assert torch.equal(DecodeStep(plugged, cache, 1).run(requests), expected)
        plugged.routed.places.clear()
        assert torch.equal(recorded.run(requests), expected)
        assert torch.equal(recorded.run(requests), expected)
    assert len(plugged.routed.places) == 2, "all layers of a lane leave from one place"


def test_steps_of_every_size_are_recorded_before_the_first_request(transformer, cache):
    recorded = DecodeStep(transformer.plugged_into(Afar(None)), cache, 2, ReplayingRecorder)
    before = cache.latents.clone()
    with kernels_forced():
        assert recorded.prepare([1, 2])
    levels = min(PAGES_COUNT, pages_for(transformer.config.positions_max))
    assert sorted(recorded._graphs._tapes) == [(0, rows, levels) for rows in (1, 2)]
    assert torch.equal(cache.latents, before), "nobody's latents are written nowhere"
    tapes = recorded._graphs._tapes.values()
    assert len({tape.exchange.hidden.data_ptr() for tape in tapes}) == 1, "sizes that never run at once share"


def test_sizes_are_those_that_lanes_can_have():
    assert [bucket_of(rows) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 64)] == [1, 2, 4, 8, 8, 16, 16, 24, 64]
    assert lane_sizes(range(1, 4), 2) == {(0, 1), (0, 2), (0, 4)}
    assert lane_sizes(range(1, 25), 2) == {(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (1, 8), (1, 16)}


class Counting:
    """A recorder that counts beginnings, and fails from one of them on."""

    def __init__(self, fails_from: int = 1000):
        self.begun_count, self.abandoned_count, self.fails_from = 0, 0, fails_from

    def begin(self):
        """One more."""
        self.begun_count += 1
        if self.begun_count >= self.fails_from:
            raise RuntimeError("out of memory")

    def end(self):
        """Nothing to play."""
        return lambda: None

    def abandon(self):
        """Note it."""
        self.abandoned_count += 1


def one_layer(inputs, routed):
    """A lane that goes to experts once."""
    pending = routed.dispatch(0, inputs.token_ids[:, None].float(), inputs.positions, inputs.lengths)
    yield
    return pending.combine()


class Doubling:
    """Experts that answer at once."""

    is_recordable = False

    def dispatch(self, layer, hidden, expert_ids, expert_weights):
        """As the socket has it."""
        return SimpleNamespace(combine=lambda: 2 * hidden)


def test_what_cannot_be_recorded_is_computed_as_it_comes():
    recorder = Counting(fails_from=5)
    graphs = GraphedLanes(one_layer, Doubling(), lambda: recorder, (16, 64))
    assert not graphs.prepare([(0, 4), (0, 2)], torch.device("cpu"))
    assert list(graphs._tapes) == [(0, 4, 16)] and recorder.abandoned_count == 1
    inputs = StepInputs.blank(2, 3, torch.device("cpu"))
    inputs.token_ids.fill_(7)
    [doubled] = run_lanes([graphs.lane(0, inputs)])
    assert doubled.tolist() == [[14.0], [14.0]]


class Recording:
    """One of CUDA's, as torch makes it."""

    can_be_left = True

    def __init__(self, graph, pool, capture_error_mode):
        """As torch's."""

    def __enter__(self):
        """Begin."""

    def __exit__(self, *_):
        """End, unless something has made it invalid."""
        if not self.can_be_left:
            raise RuntimeError("operation failed due to a previous error during capture")


def failing_layer(inputs, routed):
    """A lane that comes to its end but once."""
    if isinstance(routed, RecordedExperts):
        raise RuntimeError("operation not permitted when stream is capturing")
    return inputs.token_ids
    yield


@pytest.fixture
def recording(monkeypatch) -> type[Recording]:
    """CUDA's recordings without CUDA."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    return Recording


@pytest.mark.parametrize("lane", [one_layer, failing_layer])
def test_a_recording_that_cannot_be_left_ends_the_node(recording, monkeypatch, lane):
    monkeypatch.setattr(recording, "can_be_left", False)
    graphs = GraphedLanes(lane, Doubling(), CudaRecorder, (16,))
    with pytest.raises(RecordingStuck, match=r"decode\.latents_bytes"):
        graphs.prepare([(0, 4)], torch.device("cpu"))


def test_a_recording_that_can_be_left_ends_nobody(recording):
    graphs = GraphedLanes(failing_layer, Doubling(), CudaRecorder, (16,))
    assert not graphs.prepare([(0, 4)], torch.device("cpu"))


def test_longer_tables_go_by_the_next_level_and_the_longest_by_none():
    graphs = GraphedLanes(one_layer, Doubling(), Counting, (16, 64))
    graphs.prepare([(0, 2)], torch.device("cpu"))
    played = [
        graphs.lane(0, StepInputs.blank(2, width, torch.device("cpu"))).gi_code.co_name
        for width in (1, 16, 17, 64, 65)
    ]
    assert played == ["play"] * 4 + ["one_layer"]


def test_what_fills_a_size_is_written_nowhere():
    ones = torch.arange(1, 4)
    wide = StepInputs.blank(4, 16, torch.device("cpu"))
    wide.fill(StepInputs(ones, ones, ones, torch.ones(3, 2, dtype=torch.int32), ones.int()))
    assert wide.slots.tolist() == [1, 2, 3, -1] and wide.token_ids.tolist() == [1, 2, 3, 1]
    wide.fill(StepInputs(ones[:1] * 9, ones[:1], ones[:1], torch.full((1, 3), 7).int(), ones[:1].int()))
    assert wide.token_ids.tolist() == [9] * 4 and wide.slots.tolist() == [1, -1, -1, -1]
    assert wide.pages[:, :3].eq(7).all()
