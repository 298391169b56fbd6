"""The words between a gateway and its nodes, in both directions."""

from typing import Any

from decode.messages import DOWN as DECODE_DOWN
from decode.messages import UP as DECODE_UP
from kernels.transport.channel import Channel
from kernels.transport.frame import Frame
from prefill.messages import DOWN as PREFILL_DOWN
from prefill.messages import UP as PREFILL_UP
from prefill.messages import PrefillPrompt

READERS = {"prefill": PREFILL_UP, "decode": DECODE_UP}


def send_to_node(channel: Channel, message: Any) -> None:
    """Send a command's message to a node; raises ChannelError."""
    schema = PREFILL_DOWN if isinstance(message, PrefillPrompt) else DECODE_DOWN
    schema.send(channel, message)


def read_from_node(kind: str, frame: Frame) -> Any:
    """The message that a node of some kind has sent; raises FrameMalformed."""
    return READERS[kind].read_frame(frame)
