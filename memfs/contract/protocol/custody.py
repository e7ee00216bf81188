"""How a process takes in the descriptors that its peers send, and gets rid of them.

close(2) may ask the filesystem behind a descriptor, which may never answer. A process that trusts its peers does not
mind; memfs, which does not, has another process take them in (owners/closer.py).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Hashable, Iterable
from typing import Any

Datagram = tuple[bytes, list[Any], int, Any]  #: what recvmsg returns: data, ancillary data, flags, address


class Custody:
    """Descriptors as they come, in this process, closed where they are not wanted."""

    __slots__ = ()

    @property
    def user(self) -> Hashable:
        """Whose turn it is when something comes (aio/turns.py); whoever trusts its peers needs no difference."""
        return None

    def receive(self, sock: socket.socket, size: int, ancillary: int, flags: int) -> Datagram:
        """Receive a datagram (recvmsg(2)). Raises OSError, and BlockingIOError where it would have to wait."""
        return sock.recvmsg(size, ancillary, flags)

    def discard(self, fds: Iterable[int]) -> None:
        """Close descriptors that came."""
        for fd in fds:
            os.close(fd)

    def close(self, sock: socket.socket) -> None:
        """Close a socket, and with it what was sent over it and not received, which may take its time (SO_LINGER)."""
        sock.close()
