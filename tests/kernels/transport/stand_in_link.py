"""A link between two "GPUs" that are this process's own memory: with delays, hangs and deaths at will."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.transport.errors import DeviceLinkFailed, DeviceTransferFailed, FrameMalformed, HelloRefused

WAIT_S = 20.0


@dataclass
class Behaviour:
    """What every link of a test does from now on."""

    delay_s: float = 0.0
    """Between both ends' posting of a transfer and its end."""
    hangs: bool = False
    opening_hangs: bool = False
    broken: bool = False
    """The library notices an error by itself."""
    refuses: bool = False
    """Posting raises."""
    posting_hangs: bool = False
    aborting_fails: bool = False
    on_abort: Callable[[], object] = bool
    """Called before anything is aborted; may wait."""


@dataclass(eq=False)
class Work:
    """One end's part of a transfer."""

    link: "StandInLink"
    pieces: Sequence[torch.Tensor]
    matched_s: float = 0.0
    done: bool = False

    def is_done(self) -> bool:
        self.link.match()
        return self.done


@dataclass
class Way:
    """One direction: a send and a receive meet here."""

    send: Work | None = None
    receive: Work | None = None


@dataclass
class Joint:
    """What two links share."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    ways: tuple[Way, Way] = field(default_factory=lambda: (Way(), Way()))
    """The first carries what the connecting end sends."""
    dead: bool = False


class StandInLink:
    """Moves CPU tensors; sizes must match piece by piece, else nothing ever arrives."""

    device = torch.device("cpu")
    joints: dict[int, Joint] = {}  # noqa: RUF012  emptied for each test
    numbers = itertools.count()

    def __init__(self, behaviour: Behaviour | None = None):
        self.behaviour = behaviour or Behaviour()
        self.aborted = threading.Event()
        self.opening = False
        self.opened = False
        self.moved_bytes = 0
        self.sends_count = 0
        self.heard: list[Any] = []
        self.joint: Joint | None = None
        self.tell = None
        self._rank = 0

    def offer(self) -> dict:
        number = next(self.numbers)
        self.joint = self.joints[number] = Joint()
        return {"gpu": "stand-in", "number": number}

    def answer(self, offer: Any) -> dict:
        if offer.get("number") not in self.joints:
            raise HelloRefused("no such joint")
        self.joint, self._rank = self.joints[offer["number"]], 1
        return {"gpu": "stand-in too"}

    def confirm(self, answer: Any) -> dict:
        if answer != {"gpu": "stand-in too"}:
            raise DeviceLinkFailed("not the answer")
        return {"number": "agreed"}

    def open(self, confirmed: Any, tell: Any) -> None:
        assert confirmed == ({"number": "agreed"} if self._rank else None)
        self.opening = True
        self.tell = tell
        while self.behaviour.opening_hangs:
            time.sleep(0.005)
        try:
            self.joint.both.wait(WAIT_S)
        except threading.BrokenBarrierError as error:
            raise DeviceLinkFailed("the other end went away") from error
        self.opened = True

    def hear(self, told: Any) -> None:
        if told == "nonsense":
            raise FrameMalformed("nonsense")
        self.heard.append(told)

    def mark(self) -> str:
        return threading.current_thread().name

    def send(self, pieces: Sequence[torch.Tensor], after: Any) -> Work:
        self.sends_count += 1
        return self._post("send", self._rank, pieces, after)

    def receive(self, pieces: Sequence[torch.Tensor], after: Any) -> Work:
        return self._post("receive", 1 - self._rank, pieces, after)

    def check(self) -> None:
        if self.behaviour.broken:
            raise DeviceTransferFailed("the stand-in broke")

    def abort(self) -> bool:
        self.behaviour.on_abort()
        if self.joint is not None:
            self.joint.both.abort()
            with self.joint.lock:
                self.joint.dead = True
        self.aborted.set()
        return not self.behaviour.aborting_fails

    def match(self) -> None:
        with self.joint.lock:
            for way in self.joint.ways:
                self._move(way)

    def _post(self, role: str, number: int, pieces: Sequence[torch.Tensor], after: Any) -> Work:
        assert self.opened, "posted before the link was open"
        assert after, "posted without a mark"
        assert all(piece.nbytes and piece.dtype == torch.uint8 and piece.ndim == 1 for piece in pieces)
        if self.behaviour.refuses:
            raise DeviceTransferFailed("the stand-in refuses")
        if self.behaviour.posting_hangs:
            assert self.aborted.wait(WAIT_S)
            raise DeviceTransferFailed("aborted while it posted")
        work = Work(self, pieces)
        with self.joint.lock:
            assert getattr(self.joint.ways[number], role) is None, "two transfers at once in one direction"
            setattr(self.joint.ways[number], role, work)
        return work

    def _move(self, way: Way) -> None:
        send, receive = way.send, way.receive
        if send is None or receive is None or self.joint.dead or self.behaviour.hangs:
            return
        now_s = time.monotonic()
        send.matched_s = send.matched_s or now_s
        if now_s - send.matched_s < self.behaviour.delay_s:
            return
        sizes = [piece.nbytes for piece in send.pieces]
        assert sizes == [piece.nbytes for piece in receive.pieces], "the ends cut differently"
        for target, source in zip(receive.pieces, send.pieces, strict=True):
            target.copy_(source)
        self.moved_bytes += sum(sizes)
        send.done = receive.done = True
        way.send = way.receive = None
