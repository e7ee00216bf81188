"""How owners and registrations are written down, so that a successor has them again: values of keys (state/journal.py).

    o OWNER           an owner: its token, its user, and what it calls itself
    p FILE            a registration, which is a pair of a file and its owner: the owner, the inode, how often it was
                      registered, and what the owner allowed
    f FILE GIBIBYTE   the extent of frame numbers that a gibibyte of a registered file has
    l FILE PAGE       from that page on, pages of a registered file are locked so often, up to the next such key
    q OWNER SLOT      one of the last answers that the owner was given (answers.py)
    w                 the numbers that were given last, of owners and registrations: none is ever used again

What belongs to an owner or a registration that is gone is ignored, and a successor removes it.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from memfs.contract.protocol.messages import Token
from memfs.contract.protocol.wire import TOKEN_SIZE

OWNER: Final = b"o"
REGISTRATION: Final = b"p"
EXTENT: Final = b"f"
LOCKS: Final = b"l"
ANSWER: Final = b"q"
LAST: Final = b"w"

_OWNER: Final = struct.Struct(f"={TOKEN_SIZE}sI")  # then the name
_REGISTRATION: Final = struct.Struct("=QQI?")
_LAST: Final = struct.Struct("=QQ")
_EXTENT: Final = struct.Struct("=Q")
_COUNT: Final = struct.Struct("=I")
_PART: Final = struct.Struct(">Q")  # of a key: a gibibyte, a page


class SavedOwner(NamedTuple):
    """An owner as it was written."""

    token: Token
    uid: int
    name: str


class SavedRegistration(NamedTuple):
    """A registration as it was written."""

    owner: int
    ino: int
    times: int  #: how often it was registered
    preserves: bool


def pack_owner(token: Token, uid: int, name: str) -> bytes:
    """Return what is written of an owner."""
    return _OWNER.pack(token, uid) + name.encode()


def unpack_owner(value: bytes) -> SavedOwner:
    """Return what was written of an owner."""
    token, uid = _OWNER.unpack_from(value)
    return SavedOwner(Token(token), uid, value[_OWNER.size :].decode())


def pack_registration(owner: int, ino: int, count: int, *, preserves: bool) -> bytes:
    """Return what is written of a registration."""
    return _REGISTRATION.pack(owner, ino, count, preserves)


def unpack_registration(value: bytes) -> SavedRegistration:
    """Return what was written of a registration."""
    return SavedRegistration(*_REGISTRATION.unpack(value))


def pack_last(owner: int, file: int) -> bytes:
    """Return what is written of the numbers that were given last."""
    return _LAST.pack(owner, file)


def unpack_last(value: bytes) -> tuple[int, int]:
    """Return the numbers that were given last, of an owner and of a registration."""
    owner, file = _LAST.unpack(value)
    return owner, file


def part(number: int) -> bytes:
    """Return the rest of a key: a gibibyte of a file, or a page."""
    return _PART.pack(number)


def number_of(rest: bytes) -> int:
    """Return the number in the rest of a key."""
    number: int = _PART.unpack(rest)[0]
    return number


def pack_extent(extent: int) -> bytes:
    """Return what is written of an extent."""
    return _EXTENT.pack(extent)


def unpack_extent(value: bytes) -> int:
    """Return the number of an extent."""
    extent: int = _EXTENT.unpack(value)[0]
    return extent


def pack_count(count: int) -> bytes:
    """Return what is written of how often pages are locked."""
    return _COUNT.pack(count)


def unpack_count(value: bytes) -> int:
    """Return how often pages are locked."""
    count: int = _COUNT.unpack(value)[0]
    return count
