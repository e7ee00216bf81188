"""The process at the other end of a socket, as the kernel recorded it when the connection was made (unix(7))."""

from __future__ import annotations

import socket
import struct
from typing import Any, Final, NamedTuple, Protocol

_UCRED: Final = struct.Struct("=iII")  # struct ucred


class _Socket(Protocol):
    """A socket of the standard library, or one of trio's."""

    def getsockopt(self, level: int, option: int, size: int, /) -> Any:
        """Return an option as bytes."""


class PeerCredentials(NamedTuple):
    """The process that connected or, at the end that connected, the one that listened."""

    pid: int  #: 0 if it is in a pid namespace that we do not see
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: _Socket) -> PeerCredentials:
        """Return those of a socket (SO_PEERCRED). Raises OSError."""
        return cls(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
