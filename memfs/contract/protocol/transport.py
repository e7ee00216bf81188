"""A connection's socket, without the turns of the event loop that trio takes to be fair.

Each of trio's socket calls yields to all other tasks even if it could be done at once, and so does taking a lock that
is free. A conversion is a handful of small messages between two processes that wait for each other, and most of its
time was such turns. So here a call that can be done is done, and one task reads for all connections (poller.py). That
is as fair as it has to be: who sends without end is read from no more often than others, and is stopped by the
protocol's limits, or has to wait for its answers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import trio

from memfs.contract.aio.poller import Poller, Reader

Datagram = tuple[bytes, list[Any], int, Any]  #: what recvmsg returns: data, ancillary data, flags, address

_MSG_PEEK: Final = int(socket.MSG_PEEK)


class Datagrams:
    """`sendmsg` and `recvmsg` of a connected socket, which stays the trio socket's to name and to shut down.

    They raise OSError, and trio.ClosedResourceError once it has been closed.
    """

    __slots__ = ("_poller", "_socket", "_view")

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket: Final = sock
        # The same descriptor, by another name; trio's is non-blocking.
        self._view: Final = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        self._poller: Final = Poller.here()

    def read(self, reader: Reader) -> None:
        """Have somebody called when there is something to receive. Raises OSError if that cannot be had."""
        self._check_open()
        self._poller.read(self._view.fileno(), reader)

    def pause(self) -> None:
        """Call nobody, until `read`."""
        self._poller.remove(self._view.fileno())

    async def sendmsg(self, buffers: Iterable[bytes], ancillary: Iterable[tuple[int, int, Any]]) -> int:
        """sendmsg(2); waits only while the peer does not read."""
        while True:
            try:
                return self.sendmsg_now(buffers, ancillary)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._view)

    def sendmsg_now(self, buffers: Iterable[bytes], ancillary: Iterable[tuple[int, int, Any]]) -> int:
        """sendmsg(2). Raises BlockingIOError if the peer does not read."""
        self._check_open()
        return self._view.sendmsg(buffers, ancillary)

    def recvmsg_now(self, size: int, ancillary: int, flags: int) -> Datagram:
        """recvmsg(2). Raises BlockingIOError if there is nothing."""
        self._check_open()
        return self._view.recvmsg(size, ancillary, flags)

    def peek_within(self, seconds: float, size: int) -> bytes:
        """The first bytes of what can be received, or comes so soon; nothing else runs meanwhile.

        None if nothing does, or the end.
        """
        deadline = time.perf_counter() + seconds
        while True:
            self._check_open()
            try:
                return self._view.recv(size, _MSG_PEEK)
            except BlockingIOError:
                if time.perf_counter() >= deadline:
                    return b""
                os.sched_yield()

    def close(self, discard: Callable[[tuple[int]], object]) -> None:
        """End the connection; who waits in a call gets ClosedResourceError. `discard` closes the descriptor.

        That closes what was sent over it and not received, too, and a descriptor that is sent may be one that takes
        its time to be closed (SO_LINGER).
        """
        self._let_go()
        if self._socket.fileno() < 0:
            return
        trio.lowlevel.notify_closing(self._socket)
        with contextlib.suppress(OSError):  # the other end has gone
            self._socket.shutdown(socket.SHUT_RDWR)
        discard((self._socket.detach(),))

    def __del__(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """The descriptor is trio's to close."""
        if self._view.fileno() >= 0:
            self._poller.remove(self._view.fileno())
            self._view.detach()

    def _check_open(self) -> None:
        if self._view.fileno() < 0:
            raise trio.ClosedResourceError("the socket has been closed")
