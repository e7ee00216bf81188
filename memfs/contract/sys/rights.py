"""Descriptors that go beside a datagram on a unix socket (SCM_RIGHTS, unix(7))."""

from __future__ import annotations

import array
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

_INT: Final = array.array("i").itemsize

Rights = list[tuple[int, int, Any]]  #: descriptors, as sendmsg's ancillary data


def to_rights(fds: Sequence[int]) -> Rights:
    """Return the ancillary data with which descriptors are sent."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> Iterator[int]:
    """Generate the descriptors that came with a datagram, which the caller closes."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            yield from numbers


def space_for(count: int) -> int:
    """Return how many bytes of ancillary data so many descriptors need, to be given to recvmsg."""
    return socket.CMSG_SPACE(count * _INT)
