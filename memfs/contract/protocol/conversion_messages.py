"""The messages about conversions (memfs/contract/conversion.py).

One message begins a conversion, for both files and all ranges, and one ends it: while an owner is asked to unmap and
waits for frames that change sides, each message more would be a round trip of its vCPUs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from memfs.contract.conversion import MAX_RANGES
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.wire import MAX_PAGES, FileId, Malformed, Message, parse_flag


@dataclass(frozen=True, slots=True)
class AllowPreserve(Message):
    """Owner: conversions of this guest-sealed file may keep the content of pages, for its memory is not encrypted.

    Until it is unregistered. Not for TDX and SEV. Failed with EBADF: not registered. EINVAL: not guest-sealed.
    """

    TYPE = 19
    _BODY = struct.Struct("<Q")
    file: FileId

    def _fields(self) -> tuple[Any, ...]:
        return (self.file,)


@dataclass(frozen=True, slots=True)
class _Conversion(Message):
    """A message about pages that change sides between a shared and a private file: `ranges` are of both.

    One of the two files may be NO_FILE: it has no owner.
    """

    _BODY = struct.Struct("<QQBQ")
    _RANGE: ClassVar[int] = 16  # bytes
    MAX_RANGES: ClassVar[int] = MAX_RANGES
    MIN_RANGES: ClassVar[int] = 1
    shared: FileId
    private: FileId
    to_private: bool
    ranges: PageRanges
    cause: int = field(default=0, compare=False)

    @property
    def subject(self) -> dict[str, object]:
        """What it is about, for logs."""
        to = "private" if self.to_private else "shared"
        return {"shared": self.shared, "private": self.private, "to": to, "pages": self.ranges}

    def pack(self) -> bytes:
        """Return the body as it travels."""
        head = self._BODY.pack(self.shared, self.private, self.to_private, self.cause)
        return head + self.ranges.pack()

    @classmethod
    def unpack(cls, body: memoryview) -> Self:
        """Return the message with this body. Raises Malformed."""
        number, rest = divmod(len(body) - cls._BODY.size, cls._RANGE)
        if rest or not cls.MIN_RANGES <= number <= cls.MAX_RANGES:
            raise Malformed(f"a {cls.__name__} of {len(body)} bytes")
        shared, private, to_private, cause = cls._BODY.unpack_from(body)
        if shared == private:  # also if both are NO_FILE
            raise Malformed(f"file {shared} on both sides")
        try:
            ranges = PageRanges.unpack(body[cls._BODY.size :])
        except ValueError as error:
            raise Malformed(str(error)) from error
        if ranges.end > MAX_PAGES:
            raise Malformed(f"page {ranges.end - 1} is in no file")
        return cls(shared, private, parse_flag(to_private), ranges, cause)


@dataclass(frozen=True, slots=True)
class ConvertBegin(_Conversion):
    """Store: these pages are about to change sides. After the Ack nothing of the owner maps them, from either file.

    Nor may it until ConvertEnd. Pages that are on the wanted side already may be among them.
    """

    TYPE = 20


@dataclass(frozen=True, slots=True)
class ConvertEnd(_Conversion):
    """Store: the conversion of these files that began is over; `ranges` are on the wanted side now, and allocated.

    They are what ConvertBegin said, or, if it failed or was interrupted, a part of it, or nothing. Not answered.
    """

    TYPE = 21
    MIN_RANGES = 0
