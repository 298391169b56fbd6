"""Lanes recorded once for each size of batch, and played again without Python between their kernels.

All that can be recorded is so before the first request: a size that is not is computed as it comes.

A lane leaves the device only where its tokens travel to experts. So it is recorded as pieces: up to a
dispatch, what is computed meanwhile, and from the answer to the next dispatch; as one where the experts are
on the same device. A piece reads and writes the same memory each time: what changes from step to step is
copied into its inputs.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch

from decode.step_inputs import StepInputs, bucket_of
from kernels.model.moe import PendingExperts, RoutedExperts
from kernels.model.transformer import Lane, run_lanes

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
MakeLane = Callable[[StepInputs, RoutedExperts], Lane]


class RecordingStuck(RuntimeError):
    """A recording can neither be finished nor left."""


class Recorder(Protocol):
    """Takes note of what a device is told to compute, instead of having it computed."""

    def begin(self) -> None:
        """Record from now on."""

    def end(self) -> Replay:
        """Stop; what computes all that was recorded, on the same memory."""

    def abandon(self) -> None:
        """Stop, after an error, and let go of what was recorded since the beginning of a piece."""


class CudaRecorder:
    """Records CUDA graphs; those of one lane share memory: they play in the order of their recording."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recording: torch.cuda.graph | None = None

    def begin(self) -> None:
        """Record from now on what this thread gives the device."""
        self._graph = torch.cuda.CUDAGraph()
        self._recording = torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")
        self._recording.__enter__()

    def end(self) -> Replay:
        """Stop; one launch plays everything; raises RecordingStuck."""
        self._leave()
        return self._graph.replay

    def abandon(self) -> None:
        """Leave the recording that an error has made useless; raises RecordingStuck."""
        if self._recording is not None:
            self._leave()

    def _leave(self) -> None:
        recording, self._recording = self._recording, None
        try:
            recording.__exit__(None, None, None)
        except RuntimeError as error:  # this thread stays on the stream that records, and torch thinks so too
            raise RecordingStuck(
                "CUDA made a recording invalid, and this process cannot compute any more; see the error "
                "before this one: if it is memory, lower decode.latents_bytes or decode.requests_max"
            ) from error


@dataclass(slots=True)
class Exchange:
    """Where a lane's tokens leave for experts and come back, in whatever layer and size of lane.

    A layer's answer is waited for before the next layer's tokens are put here, and it comes after all that
    read them on their way, be it on other streams or other GPUs.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor
    mixed: torch.Tensor
    """The answer, `[requests, hidden]` float32."""

    def rows(self, count: int) -> "Exchange":
        """The first so many of it."""
        return Exchange(*(getattr(self, each.name)[:count] for each in fields(self)))

    def put(self, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
        """Have these leave from here."""
        self.hidden.copy_(hidden)
        self.expert_ids.copy_(expert_ids)
        self.expert_weights.copy_(expert_weights)


@dataclass(slots=True)
class Travel:
    """One layer's tokens on their way to experts and back, between two pieces."""

    layer: int
    meanwhile: Replay | None = None
    after: Replay | None = None


@dataclass(slots=True)
class Tape:
    """One recorded lane."""

    inputs: StepInputs
    exchange: Exchange | None
    """None where nothing leaves the device."""
    before: Replay | None = None
    travels: list[Travel] = field(default_factory=list)
    hidden: torch.Tensor | None = None

    def play(self, inputs: StepInputs, routed: RoutedExperts) -> Lane:
        """The lane of other requests, at most as many; what is beyond them is of the first one again."""
        count = inputs.requests_count
        self.inputs.fill(inputs)
        self.before()
        for travel in self.travels:
            used = self.exchange.rows(count)
            pending = routed.dispatch(travel.layer, used.hidden, used.expert_ids, used.expert_weights)
            travel.meanwhile()
            yield
            used.mixed.copy_(pending.combine())
            travel.after()
        return self.hidden[:count].clone()  # the next step writes there again


class Rehearsal:
    """Experts that answer nothing: a first run loads every kernel, which cannot be done while recording."""

    def __init__(self) -> None:
        self.exchange: Exchange | None = None

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> "Rehearsal":
        """Go nowhere; the first makes room for all others."""
        if self.exchange is None:
            leaving = (torch.zeros_like(part) for part in (hidden, expert_ids, expert_weights))
            self.exchange = Exchange(*leaving, torch.zeros_like(hidden, dtype=torch.float32))
        return self

    def combine(self) -> torch.Tensor:
        """Zeros, `[tokens, hidden]` float32."""
        return self.exchange.mixed


class RecordedExperts:
    """The socket of a lane that is being recorded: each dispatch ends a piece and begins the next."""

    def __init__(self, tape: Tape, recorder: Recorder):
        self._tape = tape
        self._recorder = recorder

    def begin(self) -> None:
        """Record the piece up to the first dispatch."""
        self._recorder.begin()

    def dispatch(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> PendingExperts:
        """End the piece before a dispatch; what comes until the answer is a piece too."""
        self._tape.exchange.put(hidden, expert_ids, expert_weights)
        self._end_piece()
        self._tape.travels.append(Travel(layer))
        self._recorder.begin()
        return self

    def combine(self) -> torch.Tensor:
        """End what is computed meanwhile, and go on from where the answer will be."""
        travel = self._tape.travels[-1]
        travel.meanwhile = self._recorder.end()
        self._recorder.begin()
        return self._tape.exchange.mixed

    def end(self, hidden: torch.Tensor) -> None:
        """End the last piece, whose result is `hidden`."""
        self._end_piece()
        self._tape.hidden = hidden

    def _end_piece(self) -> None:
        replay = self._recorder.end()
        if self._tape.travels:
            self._tape.travels[-1].after = replay
        else:
            self._tape.before = replay


class GraphedLanes:
    """Tapes by size; lanes side by side do not share them."""

    def __init__(
        self,
        make_lane: MakeLane,
        routed: RoutedExperts,
        make_recorder: Callable[[], Recorder],
        pages_levels: Sequence[int],
    ):
        """Steps are recorded for page tables of these widths, ascending."""
        self._make_lane = make_lane
        self._routed = routed
        self._make_recorder = make_recorder
        self._pages_levels = pages_levels
        self._recorders: dict[int, Recorder] = {}
        self._exchanges: dict[int, Exchange] = {}
        self._tapes: dict[tuple[int, int, int], Tape] = {}

    def lane(self, number: int, inputs: StepInputs) -> Lane:
        """The lane of `inputs`, the `number`-th of those that alternate: recorded, if its size is."""
        width = inputs.pages.shape[1]
        level = next((level for level in self._pages_levels if level >= width), width)
        tape = self._tapes.get((number, bucket_of(inputs.requests_count), level))
        if tape is None:
            return self._make_lane(inputs, self._routed)
        return tape.play(inputs, self._routed)

    def prepare(self, sizes: Iterable[tuple[int, int]], device: torch.device) -> bool:
        """Record lanes of some (number, rows); whether all could be. Others are computed as they come.

        The largest should come first: it makes room for all.
        """
        for number, rows in sizes:
            if number not in self._recorders:
                self._recorders[number] = self._make_recorder()
            for level in self._pages_levels:
                try:
                    self._tapes[number, rows, level] = self._record(number, rows, level, device)
                except RecordingStuck:
                    raise
                except RuntimeError:
                    logger.exception("a step of %s requests and %s pages cannot be recorded", rows, level)
                    self._recorders.pop(number).abandon()
                    return False
        return True

    def _record(self, number: int, rows: int, pages_count: int, device: torch.device) -> Tape:
        inputs = StepInputs.blank(rows, pages_count, device)
        rehearsal = Rehearsal()
        is_whole = self._routed.is_recordable
        run_lanes([self._make_lane(inputs, self._routed if is_whole else rehearsal)])
        tape = Tape(inputs, self._shared(number, rows, rehearsal.exchange))
        piecewise = RecordedExperts(tape, self._recorders[number])
        piecewise.begin()
        [hidden] = run_lanes([self._make_lane(inputs, self._routed if is_whole else piecewise)])
        piecewise.end(hidden)
        return tape

    def _shared(self, number: int, rows: int, exchange: Exchange | None) -> Exchange | None:
        """What all sizes of a lane share, of which one runs at a time; `exchange` itself if it is larger."""
        if exchange is None:
            return None
        largest = self._exchanges.get(number)
        if largest is None or len(largest.hidden) < rows:
            self._exchanges[number] = exchange
        return self._exchanges[number].rows(rows)
