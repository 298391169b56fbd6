"""The errors of the transport.

ChannelError
├── AddressInvalid     what was given is no address
├── ListenFailed       the address cannot be listened at
├── ConnectFailed      nobody answers at the address
├── DeviceUnavailable  the address is for GPUs, and this process has none, or no library to use it
├── ChannelClosed      the peer went away between two frames
│   ├── DeviceLinkFailed      the GPUs were not joined in time
│   └── DeviceTransferFailed  bytes between the GPUs did not arrive in time, or the link reported an error
├── ChannelTimeout     nothing, or not all, came in time
├── ChannelStalled     the peer does not read: too much waits to be sent
└── FrameError         the bytes are not what the protocol allows; the channel is closed
    ├── FrameTruncated the peer went away, or fell silent, inside a frame
    ├── FrameTooLarge  a size that is announced is over the limit
    ├── FrameMalformed the bytes are no frame at all
    └── HelloRefused   the first frame was not a valid hello
"""


class ChannelError(ConnectionError):
    """Something is wrong with one channel; other channels are not touched."""


class AddressInvalid(ChannelError):
    """The text is no address: write scheme://rest, with a scheme that the transport knows."""


class ListenFailed(ChannelError):
    """The address cannot be listened at: it is taken, forbidden, or not this host's."""


class ConnectFailed(ChannelError):
    """Nobody answers at the address: check that the peer runs and that the address is its newest."""


class DeviceUnavailable(ChannelError):
    """The address is for GPUs: run on a host with one and install the extra `gpu`, or use another address."""


class ChannelClosed(ChannelError):
    """The channel ended between two frames: connect again; a peer that refused our hello closes too."""


class DeviceLinkFailed(ChannelClosed):
    """The GPUs of both ends were not joined; the channel is closed: connect again."""


class DeviceTransferFailed(ChannelClosed):
    """Bytes between the GPUs did not arrive; the channel is closed: connecting again joins the GPUs anew."""


class ChannelTimeout(ChannelError):
    """The peer did not send or take a whole frame in the time given."""


class ChannelStalled(ChannelError):
    """More bytes wait for the peer than the limit allows: it has stopped reading."""


class FrameError(ChannelError):
    """The bytes received break the protocol, so that nothing after them can be trusted."""


class FrameTruncated(FrameError):
    """The peer went away, or fell silent, in the middle of a frame."""


class FrameTooLarge(FrameError):
    """The frame announces more bytes than the receiver allows; nothing was allocated for it."""


class FrameMalformed(FrameError):
    """The bytes are not a frame of this protocol."""


class HelloRefused(FrameError):
    """The peer did not begin with a valid hello: its secret or its protocol version is another."""
