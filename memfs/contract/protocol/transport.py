"""A connection's socket, without the event-loop iterations that trio takes to be fair.

Each of trio's socket calls yields to all other tasks even if it could be done immediately. A conversion is a handful of
small messages between two processes that wait for each other, and most of its time was such iterations. So the socket
is a non-blocking one of the standard library's, a call that can be done is done, and one task reads for all connections
(aio/poller.py). That is as fair as it has to be: a peer that sends without end is read from no more often than others,
and is stopped by the protocol's limits, or has to wait for its answers.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

import trio

from memfs.contract.aio.poller import Poller, Reader
from memfs.contract.protocol.custody import Custody, Datagram
from memfs.contract.sys.rights import Rights

_MSG_PEEK: Final = int(socket.MSG_PEEK)


class Datagrams:
    """A connected socket of type SOCK_SEQPACKET, which this owns from now on.

    `send`, `receive` and `peek` raise OSError, and BlockingIOError where they would have to wait.
    """

    __slots__ = ("_custody", "_poller", "_socket")

    def __init__(self, sock: socket.socket, custody: Custody) -> None:
        sock.setblocking(False)
        self._socket: Final = sock
        self._custody: Final = custody
        self._poller: Final = Poller.here()

    def read(self, reader: Reader) -> None:
        """Have a reader called when there is something to receive. Raises OSError."""
        self._poller.read(self._socket.fileno(), reader, self._custody.user)

    def pause(self) -> None:
        """Have nobody called until `read`."""
        self._poller.remove(self._socket.fileno())

    def send(self, data: bytes, rights: Rights) -> None:
        """Send a datagram (sendmsg(2))."""
        self._socket.sendmsg([data], rights)

    async def wait_writable(self) -> None:
        """Wait until the peer has read something. Raises trio.ClosedResourceError when this end is closed."""
        await trio.lowlevel.wait_writable(self._socket)

    async def wait_readable(self) -> None:
        """Wait until there is something to receive. Raises trio.ClosedResourceError when this end is closed."""
        await trio.lowlevel.wait_readable(self._socket)

    def receive(self, size: int, ancillary: int, flags: int) -> Datagram:
        """Receive a datagram (recvmsg(2))."""
        return self._custody.receive(self._socket, size, ancillary, flags)

    def peek(self, size: int) -> bytes:
        """Return the first bytes of the datagram that comes next, and leave it there; b"" at the end."""
        return self._socket.recv(size, _MSG_PEEK)

    def close(self) -> None:
        """End the connection."""
        self.pause()
        trio.lowlevel.notify_closing(self._socket)
        with contextlib.suppress(OSError):  # the other end has gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._custody.close(self._socket)
