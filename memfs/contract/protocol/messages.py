"""The messages that memfs and an owner can send: one class a message, with its body on the wire.

Each class packs its own body and unpacks it again, and refuses bytes that are not exactly what it would have packed
(wire.py): a flag is 0 or 1, a range is not empty, a text is UTF-8 and bounded, runs cover what they claim to cover.
Which message may come when is not decided here but in connection.py. conversion_messages.py has those of conversions.

Little-endian, no pickle, every length bounded. Pages are page indexes, ranges half-open.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self

from memfs.contract.protocol.conversion_messages import AllowPreserve, ConvertBegin, ConvertEnd
from memfs.contract.protocol.wire import (
    MAX_ERRNO,
    MAX_TEXT,
    NO_FILE,
    NO_TOKEN,
    SOCKET_XATTR,
    TOKEN_SIZE,
    VERSION,
    FileId,
    Malformed,
    Message,
    Token,
    pack_text,
    parse_errno,
    parse_flag,
    parse_pages,
    parse_text,
)
from memfs.contract.units import (
    MAX_OFFSET,
    ORDER_1G,
    ORDER_2M,
    ORDER_4K,
    PAGE_SIZE,
    ByteOffset,
    PageRange,
    Pfn,
    pages_to_bytes,
)

__all__ = [
    "MAX_ERRNO",
    "MAX_TEXT",
    "MESSAGES",
    "NO_FILE",
    "NO_TOKEN",
    "SOCKET_XATTR",
    "VERSION",
    "Ack",
    "AllowPreserve",
    "ConvertBegin",
    "ConvertEnd",
    "Done",
    "Failed",
    "Fallocate",
    "Fenced",
    "FileId",
    "GetPfn",
    "Hello",
    "HelloReply",
    "InvalidateBegin",
    "InvalidateEnd",
    "Launch",
    "Malformed",
    "Measured",
    "Message",
    "Notification",
    "PfnReply",
    "PfnRun",
    "Populate",
    "PutPfn",
    "Register",
    "Registered",
    "Request",
    "Token",
    "Unregister",
]

_ORDERS: Final = frozenset({ORDER_4K, ORDER_2M, ORDER_1G})


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Owner: the first message. Which protocol versions it speaks, and a name for logs (not trusted, not unique).

    `token`: of the HelloReply of an earlier connection, which ended with the memfs that it was to: I am that owner.
    Failed with ESTALE: there is no such owner, or not of this user. Only the versions are the same in all versions.
    """

    TYPE = 1
    _VERSIONS: ClassVar[struct.Struct] = struct.Struct("<HH")
    _BODY = struct.Struct(f"<HH{TOKEN_SIZE}s")
    min_version: int = VERSION
    max_version: int = VERSION
    name: str = ""
    token: Token = field(default=NO_TOKEN, repr=False)

    def pack(self) -> bytes:
        """Return the body as it travels."""
        if self.max_version < VERSION:
            return self._VERSIONS.pack(self.min_version, self.max_version) + pack_text(self.name)
        return self._BODY.pack(self.min_version, self.max_version, self.token) + pack_text(self.name)

    @classmethod
    def unpack(cls, body: memoryview) -> Self:
        """Return the message with this body. Raises Malformed."""
        if len(body) < cls._VERSIONS.size:
            raise Malformed("Hello is cut short")
        low, high = cls._VERSIONS.unpack_from(body)
        if low > high:
            raise Malformed(f"versions {low} to {high} are none")
        if high < VERSION:  # then there was no token
            return cls(low, high, parse_text(body[cls._VERSIONS.size :]))
        if len(body) < cls._BODY.size:
            raise Malformed("Hello is cut short")
        return cls(low, high, parse_text(body[cls._BODY.size :]), Token(cls._BODY.unpack_from(body)[2]))


@dataclass(frozen=True, slots=True)
class HelloReply(Message):
    """Store: the version both will speak and the page size in bytes.

    `token`: with which to come back if this memfs dies and another goes on in its place; NO_TOKEN: none will.
    """

    TYPE = 2
    _BODY = struct.Struct(f"<HHI{TOKEN_SIZE}s")
    version: int
    page_size: int
    token: Token = field(default=NO_TOKEN, repr=False)

    def _fields(self) -> tuple[Any, ...]:
        return self.version, 0, self.page_size, self.token

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        version, _, page_size, token = fields
        return cls(version, page_size, Token(token))


@dataclass(frozen=True, slots=True)
class Register(Message):
    """Owner: let me own the file whose descriptor, open for reading and writing, travels with this.

    RFC: memfd_register_guest. Failed with EINVAL: not a regular file of this mount. EACCES: not open for reading and
    writing. EBADF: an O_PATH descriptor. EPERM: another owner has it, or it is immutable or append-only (chattr(1)).
    Registering again is fine; it must then be unregistered as often.
    """

    TYPE = 3
    _BODY = struct.Struct("<")
    DESCRIPTORS = frozenset({1})


@dataclass(frozen=True, slots=True)
class Registered(Message):
    """Store: the file is yours. With it travel the backing file and, if `sealed`, its page map (read-only).

    `granule`: pages are allocated and freed in aligned blocks of so many bytes (4 KiB, 2 MiB or 1 GiB), and the size of
    the file is a multiple of it. More than 4 KiB if it lies on huge pages of hugetlbfs.
    """

    TYPE = 4
    _BODY = struct.Struct("<QQQQQ")
    DESCRIPTORS = frozenset({1, 2})
    GRANULES: ClassVar[frozenset[int]] = frozenset(pages_to_bytes(1 << order) for order in _ORDERS)
    file: FileId
    ino: int  #: inode number on the mount
    size: int  #: bytes
    seals: int  #: F_SEAL_* bits
    granule: int = PAGE_SIZE

    def _fields(self) -> tuple[Any, ...]:
        return self.file, self.ino, self.size, self.seals, self.granule

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        registered = cls(*fields)
        if registered.granule not in cls.GRANULES:
            raise Malformed(f"a granule of {registered.granule} bytes")
        return registered


@dataclass(frozen=True, slots=True)
class Unregister(Message):
    """Owner: undo one Register. The last one releases the inode. Failed with EBADF: no such registration."""

    TYPE = 5
    _BODY = struct.Struct("<Q")
    file: FileId

    def _fields(self) -> tuple[Any, ...]:
        return (self.file,)


@dataclass(frozen=True, slots=True)
class _OnPages(Message):
    """A message about a range of pages of a registered file.

    `cause` is for logs: the number of the request that brought it about, 0 if there is none to name.
    """

    _BODY = struct.Struct("<QQQQ")
    file: FileId
    pages: PageRange
    cause: int = field(default=0, compare=False)

    @property
    def subject(self) -> dict[str, object]:
        """What it is about, for logs."""
        return {"file": self.file, "pages": self.pages}

    def _fields(self) -> tuple[Any, ...]:
        return self.file, self.pages.start, self.pages.end, self.cause

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        file, start, end, cause = fields
        return cls(file, parse_pages(start, end), cause)


@dataclass(frozen=True, slots=True)
class GetPfn(Message):
    """Owner: which frames hold these pages? Lock those that exist (RFC: get_lock_pfn).

    With `alloc`, absent pages are allocated first, all or none (ENOSPC). Without, or if pages of the file were
    converted before this was answered, they are reported absent. Pages past the end of the file: EINVAL. The answer may
    cover fewer pages than asked for, from the start on; every present page in it is locked against being freed until
    PutPfn.

    Failed with ENOLCK: pages are locked in too many ranges (page_locks.py); put some first.

    Without `lock` it is as if PutPfn came right behind, in one message: for an owner that makes sure in another way
    that it maps nothing of what is invalidated (kvmsim does: kvmsim/mmu/invalidate.py).
    """

    TYPE = 6
    _BODY = struct.Struct("<QQQBB")
    file: FileId
    pages: PageRange
    alloc: bool
    lock: bool = True

    def _fields(self) -> tuple[Any, ...]:
        return self.file, self.pages.start, self.pages.end, self.alloc, self.lock

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        file, start, end, alloc, lock = fields
        return cls(file, parse_pages(start, end), parse_flag(alloc), parse_flag(lock))


@dataclass(frozen=True, slots=True)
class PfnRun:
    """Neighbouring pages in neighbouring frames: page `pages.start + i` is in frame `pfn + i`; or all absent (None).

    `order`: each page lies in a naturally aligned block of 2**order pages that the store holds in one aligned block of
    frames, so a mapping of up to that order is right as far as the store goes. 0, 9 or 18; 0 for absent pages.
    """

    pages: PageRange
    pfn: Pfn | None
    order: int = 0


@dataclass(frozen=True, slots=True)
class PfnReply(Message):
    """Store: the answer to GetPfn: runs that cover `pages` without gap or overlap, in order."""

    TYPE = 7
    _BODY = struct.Struct("<QQQ")
    _RUN: ClassVar[struct.Struct] = struct.Struct("<QQQ")  # end, pfn (ABSENT if none), order
    ABSENT: ClassVar[int] = (1 << 64) - 1
    MAX_RUNS: ClassVar[int] = 2048
    ORDERS: ClassVar[frozenset[int]] = _ORDERS
    file: FileId
    pages: PageRange
    runs: tuple[PfnRun, ...]

    def pack(self) -> bytes:
        """Return the body as it travels."""
        parts = [self._BODY.pack(self.file, self.pages.start, self.pages.end)]
        parts += [
            self._RUN.pack(run.pages.end, self.ABSENT if run.pfn is None else run.pfn, run.order) for run in self.runs
        ]
        return b"".join(parts)

    @classmethod
    def unpack(cls, body: memoryview) -> Self:
        """Return the message with this body. Raises Malformed."""
        tail = body[cls._BODY.size :]
        if len(body) < cls._BODY.size or len(tail) % cls._RUN.size or len(tail) > cls.MAX_RUNS * cls._RUN.size:
            raise Malformed(f"a PfnReply of {len(body)} bytes")
        file, start, end = cls._BODY.unpack_from(body)
        pages = parse_pages(start, end)
        runs: list[PfnRun] = []
        for run_end, pfn, order in cls._RUN.iter_unpack(tail):
            if order not in cls.ORDERS:
                raise Malformed(f"order {order}")
            runs.append(PfnRun(parse_pages(start, run_end), None if pfn == cls.ABSENT else Pfn(pfn), order))
            start = run_end
        if start != end:
            raise Malformed(f"runs that end at page {start} instead of {end}")
        return cls(file, pages, tuple(runs))


@dataclass(frozen=True, slots=True)
class PutPfn(Message):
    """Owner: unlock pages locked by GetPfn, and say whether they were written (RFC: put_unlock_pfn).

    Any range of locked pages, not only a range that was got in one go. Failed with EINVAL if a page is not locked.
    """

    TYPE = 8
    _BODY = struct.Struct("<QQQB")
    file: FileId
    pages: PageRange
    dirty: bool

    def _fields(self) -> tuple[Any, ...]:
        return self.file, self.pages.start, self.pages.end, self.dirty

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        file, start, end, dirty = fields
        return cls(file, parse_pages(start, end), parse_flag(dirty))


@dataclass(frozen=True, slots=True)
class Populate(Message):
    """Owner, or a program that loads an image: fill pages of a guest-sealed file with content, and measure it.

    Two descriptors travel with this: of the file, open for writing as for Register (it need not be registered), and of
    a memfd that is sealed against shrinking, where the content is, from byte `source` on. At most MAX_PAGES at a time.
    Failed with EBUSY: the guest has begun to run. EINVAL: not guest-sealed, past its end, or no such memfd. ENOSPC.
    Otherwise as Register. store/measurement.py says how it is measured.
    """

    TYPE = 16
    _BODY = struct.Struct("<QQQ")
    DESCRIPTORS = frozenset({2})
    MAX_PAGES: ClassVar[int] = 1 << 14
    pages: PageRange
    source: ByteOffset

    def _fields(self) -> tuple[Any, ...]:
        return self.pages.start, self.pages.end, self.source

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        start, end, source = fields
        pages = parse_pages(start, end)
        if len(pages) > cls.MAX_PAGES or source > MAX_OFFSET:
            raise Malformed(f"{len(pages)} pages from byte {source} on; at most {cls.MAX_PAGES}")
        return cls(pages, ByteOffset(source))


@dataclass(frozen=True, slots=True)
class Launch(Message):
    """Owner: the guest begins to run, so the file's initial content is what it is. Idempotent. EBADF: not registered.

    KVM_TDX_FINALIZE_VM and KVM_SEV_SNP_LAUNCH_FINISH. The first GetPfn of a guest-sealed file does the same.
    """

    TYPE = 17
    _BODY = struct.Struct("<Q")
    file: FileId

    def _fields(self) -> tuple[Any, ...]:
        return (self.file,)


@dataclass(frozen=True, slots=True)
class Measured(Message):
    """Store: the answer to Populate and Launch: the measurement of all that was populated so far."""

    TYPE = 18
    _BODY = struct.Struct("<48s")
    measurement: bytes  #: SHA-384

    def _fields(self) -> tuple[Any, ...]:
        return (self.measurement,)


@dataclass(frozen=True, slots=True)
class Done(Message):
    """Store: Unregister or PutPfn is done."""

    TYPE = 9
    _BODY = struct.Struct("<")


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """Store: a request was refused and changed nothing. `errno` is the kernel's, `text` says it in words."""

    TYPE = 10
    _BODY = struct.Struct("<I")
    errno: int
    text: str

    def pack(self) -> bytes:
        """Return the body as it travels."""
        return self._BODY.pack(self.errno) + pack_text(self.text)

    @classmethod
    def unpack(cls, body: memoryview) -> Self:
        """Return the message with this body. Raises Malformed."""
        if len(body) < cls._BODY.size:
            raise Malformed(f"{cls.__name__} is cut short")
        (errno,) = cls._BODY.unpack_from(body)
        return cls(parse_errno(errno), parse_text(body[cls._BODY.size :]))


@dataclass(frozen=True, slots=True)
class InvalidateBegin(_OnPages):
    """Store: these pages are about to be freed. After the Ack nothing of the owner maps them, until InvalidateEnd."""

    TYPE = 11


@dataclass(frozen=True, slots=True)
class InvalidateEnd(_OnPages):
    """Store: the pages of that InvalidateBegin are freed (or, if that failed, still there). Faults may go on.

    Not answered.
    """

    TYPE = 12


@dataclass(frozen=True, slots=True)
class Fallocate(_OnPages):
    """Store: these pages are allocated now. For a guest-sealed file: they are private from now on."""

    TYPE = 13


@dataclass(frozen=True, slots=True)
class Ack(Message):
    """Owner: a notification has been acted upon; or `errno`, why not (the store logs it)."""

    TYPE = 14
    _BODY = struct.Struct("<I")
    errno: int = 0

    def _fields(self) -> tuple[Any, ...]:
        return (self.errno,)

    @classmethod
    def _from_fields(cls, *fields: Any) -> Self:
        return cls(parse_errno(*fields))


@dataclass(frozen=True, slots=True)
class Fenced(Failed):
    """Store: you did not answer in time, or the store is going down. All your registrations are gone."""

    TYPE = 15


Request = Hello | Register | Unregister | GetPfn | PutPfn | Populate | Launch | AllowPreserve
Notification = InvalidateBegin | InvalidateEnd | Fallocate | ConvertBegin | ConvertEnd

#: by the number on the wire
MESSAGES: Final[dict[int, type[Message]]] = {
    cls.TYPE: cls
    for cls in (
        *(Hello, HelloReply, Register, Registered, Unregister, GetPfn, PfnReply, PutPfn, Done, Failed),
        *(InvalidateBegin, InvalidateEnd, Fallocate, Ack, Fenced, Populate, Launch, Measured),
        *(AllowPreserve, ConvertBegin, ConvertEnd),
    )
}
