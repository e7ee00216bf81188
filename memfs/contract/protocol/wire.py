"""What every message of the protocol is: a type, a body, and bytes that are refused unless exactly what it would pack.

A field is parsed by a function here, which raises Malformed for what its type does not allow.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NewType, Self

from memfs.contract.units import MAX_OFFSET, ByteOffset, PageIndex, PageRange, page_floor

VERSION: Final = 2  #: of the protocol
MAX_TEXT: Final = 512  #: bytes of UTF-8 in Hello, Failed and Fenced
MAX_ERRNO: Final = 4095  #: linux/err.h
SOCKET_XATTR: Final = "user.memfs.socket"  #: of everything on a mount: the path of the socket to connect to

MAX_PAGES: Final = page_floor(ByteOffset(MAX_OFFSET)) + 1

FileId = NewType("FileId", int)  #: names a registered file of one owner; never reused
Token = NewType("Token", bytes)  #: by which memfs knows an owner again; whoever has it is the owner, so it is a secret
TOKEN_SIZE: Final = 16  #: bytes
NO_TOKEN: Final = Token(bytes(TOKEN_SIZE))
NO_FILE: Final = FileId(0)  #: names none


class Malformed(Exception):
    """Bytes that are not the message they claim to be."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message. Immutable; `pack` and `unpack` are each other's inverse for the body, without header."""

    TYPE: ClassVar[int]
    _BODY: ClassVar[struct.Struct]
    DESCRIPTORS: ClassVar[frozenset[int]] = frozenset({0})  #: how many may travel beside it

    def pack(self) -> bytes:
        """Return the body as it travels."""
        return self._BODY.pack(*self._fields())

    def _fields(self) -> tuple[Any, ...]:
        return ()

    @classmethod
    def unpack(cls, body: memoryview) -> Self:
        """Return the message with this body. Raises Malformed."""
        if len(body) != cls._BODY.size:
            raise Malformed(f"a body of {len(body)} bytes instead of {cls._BODY.size}")
        return cls._from_fields(*cls._BODY.unpack(body))

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        return cls(*fields)


def parse_pages(start: int, end: int) -> PageRange:
    """Return a half-open range of page indexes."""
    if not start < end <= MAX_PAGES:
        raise Malformed(f"[{start}, {end}) is not a range of pages")
    return PageRange(PageIndex(start), PageIndex(end))


def parse_flag(value: int) -> bool:
    """Return a flag, which travels as 0 or 1."""
    if value not in (0, 1):
        raise Malformed(f"{value} is neither true nor false")
    return bool(value)


def parse_errno(value: int) -> int:
    """Return an errno."""
    if value > MAX_ERRNO:
        raise Malformed(f"{value} is not an errno")
    return value


def pack_text(text: str) -> bytes:
    """Return a text as it travels: cut, where a character ends, after MAX_TEXT bytes."""
    return text.encode()[:MAX_TEXT].decode(errors="ignore").encode()


def parse_text(tail: memoryview) -> str:
    """Return the text that the rest of a body is."""
    if len(tail) > MAX_TEXT:
        raise Malformed(f"a text of {len(tail)} bytes; at most {MAX_TEXT}")
    try:
        return str(tail, "utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("a text that is not UTF-8") from error
