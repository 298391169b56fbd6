"""One descriptor to wait on for a socket and for what threads of this process have done."""

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable


class Doorbell:
    """Readable while the socket has what is watched for, and from a ring until the next hush."""

    def __init__(self, sock: socket.socket):
        self._lock = threading.Lock()  # nobody rings a number that is another's by now
        self._sock = sock
        self._watched = select.EPOLLIN
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._epoll.register(sock, self._watched)
        self._closed = False

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return -1 if self._closed else self._epoll.fileno()

    def watch(self, wishes: Callable[[], tuple[bool, bool]]) -> None:
        """Watch the socket for being readable and writable as is wished now, whichever thread asks.

        For neither, its end is not heard of either.
        """
        with self._lock:  # asked under it: of two threads, the later goes by what is newer
            readable, writable = wishes()
            wanted = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if writable else 0)
            if self._closed or wanted == self._watched:
                return
            if not wanted:
                self._epoll.unregister(self._sock)
            elif not self._watched:
                self._epoll.register(self._sock, wanted)
            else:
                self._epoll.modify(self._sock, wanted)
            self._watched = wanted

    def ring(self) -> None:
        """Wake who waits; safe from any thread and after closing."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._bell, 1)

    def hush(self) -> None:
        """Be ready for the next ring."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.eventfd_read(self._bell)

    def close(self) -> None:
        """Give back the descriptors; safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._epoll.close()
                os.close(self._bell)
