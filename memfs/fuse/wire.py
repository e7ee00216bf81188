"""The kernel's FUSE ABI (include/uapi/linux/fuse.h), as far as memfs speaks it itself: opcodes, structs, flags.

The ABI is stable and little more than structs; Debian's copy of the header is often older than the kernel it runs on,
so the numbers stand here. Everything is in host byte order, as the kernel writes it.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final


class Opcode(enum.IntEnum):
    """What the kernel asks for. Only those that memfs names; the kernel has more."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    FLUSH = 25
    INIT = 26
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    FALLOCATE = 43
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


IN_HEADER: Final = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extlen, padding
OUT_HEADER: Final = struct.Struct("=IiQ")  # len, -errno, unique
FALLOCATE_IN: Final = struct.Struct("=QQQII")  # fh, offset, length, mode, padding
LSEEK_IN: Final = struct.Struct("=QQII")  # fh, offset, whence, padding
LSEEK_OUT: Final = struct.Struct("=Q")  # offset
IOCTL_IN: Final = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
IOCTL_OUT: Final = struct.Struct("=iIII")  # result, flags, in_iovs, out_iovs
RELEASE_IN: Final = struct.Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
INTERRUPT_IN: Final = struct.Struct("=Q")  # unique of the interrupted request
OPEN_OUT: Final = struct.Struct("=QIi")  # fh, open_flags, backing_id
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHII24x")  # major, minor, max_readahead, flags, max_background,
# congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2, max_stack_depth
ENTRY_OUT_SIZE: Final = 128  # struct fuse_entry_out; in a CREATE reply it comes before OPEN_OUT

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_PASSTHROUGH: Final = 1 << 7

MAX_WRITE: Final = 1 << 20  #: bytes in one WRITE request: the most that the kernel sends
BUFFER_SIZE: Final = MAX_WRITE + 4096  #: bytes: the largest request, header included


class Malformed(Exception):
    """Bytes from the kernel's side that are not a request."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the kernel. `body` is a view into the receive buffer: copy what must outlive the call."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    body: memoryview

    @classmethod
    def parse(cls, data: memoryview) -> Request:
        """Raises Malformed."""
        if len(data) < IN_HEADER.size:
            raise Malformed(f"a request of {len(data)} bytes")
        length, opcode, unique, nodeid, uid, gid, pid, _, _ = IN_HEADER.unpack_from(data)
        if length != len(data):
            raise Malformed(f"a request of {len(data)} bytes that claims {length}")
        return cls(opcode, unique, nodeid, uid, gid, pid, data[IN_HEADER.size :])


def unpack(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    """The fields of a request's body. Raises Malformed if it is too short."""
    if len(body) < layout.size:
        raise Malformed(f"a body of {len(body)} bytes instead of {layout.size}")
    return layout.unpack_from(body)


def reply(unique: int, payload: bytes = b"") -> bytes:
    """A successful answer."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload


def error_reply(unique: int, errno: int) -> bytes:
    """A refusal."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)
