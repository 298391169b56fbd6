"""Messages as plain dataclasses, checked field by field when they come from another process."""

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kernels.transport.channel import Channel
from kernels.transport.errors import FrameMalformed
from kernels.transport.frame import Frame

PLACE_CHARACTERS_MAX = 80  # keys in it may be the peer's, of any length


class Schema:
    """The messages that one border knows; a frame's kind is the name of its message's class."""

    def __init__(self, *messages: type):
        self._adapters = {message.__name__: TypeAdapter(message) for message in messages}

    def send(self, channel: Channel, message: Any, parts: Sequence[memoryview] = ()) -> None:
        """Send a message, with raw bytes behind it where it describes some; raises TypeError or as `send`."""
        kind = type(message).__name__
        adapter = self._adapters.get(kind)
        if adapter is None:
            raise TypeError(f"{kind} is not a message of this border; its Schema must name it")
        channel.send(kind, adapter.dump_python(message), parts)

    def read(self, kind: str, body: Any) -> Any:
        """The message in a frame's kind and body; raises FrameMalformed for one unknown at this border."""
        adapter = self._adapters.get(kind)
        if adapter is None:
            raise FrameMalformed(f"{kind[:40]!r} is not a message of this border")
        try:
            return adapter.validate_python(body)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))[:PLACE_CHARACTERS_MAX]
            raise FrameMalformed(f"field {place!r} of {kind} is missing or of a wrong type") from error

    def read_frame(self, frame: Frame) -> Any:
        """The message of a received frame; raises FrameMalformed."""
        return self.read(frame.kind, frame.body)
