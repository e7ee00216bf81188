"""The kernel's FUSE ABI (include/uapi/linux/fuse.h), as far as memfs speaks it itself: opcodes, structs, flags.

The ABI is stable and little more than structs; Debian's copy of the header is often older than the kernel it runs on,
so the numbers stand here. Everything is in host byte order, as the kernel writes it.
"""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass
from typing import Final

from memfs.contract.units import PAGE_SIZE
from memfs.tree.inode import FOREVER, Stat


class Opcode(enum.IntEnum):
    """What the kernel asks for. Only those that memfs names; the kernel has more."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    UNLINK = 10
    OPEN = 14
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    GETXATTR = 22
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


IN_HEADER: Final = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extlen, padding
OUT_HEADER: Final = struct.Struct("=IiQ")  # len, -errno, unique
_INVAL_INODE: Final = struct.Struct("=Qqq")  # ino, offset, length
_FUSE_NOTIFY_INVAL_INODE: Final = 2
FALLOCATE_IN: Final = struct.Struct("=QQQII")  # fh, offset, length, mode, padding
LSEEK_IN: Final = struct.Struct("=QQII")  # fh, offset, whence, padding
LSEEK_OUT: Final = struct.Struct("=Q")  # offset
IOCTL_IN: Final = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
IOCTL_OUT: Final = struct.Struct("=iIII")  # result, flags, in_iovs, out_iovs
GETXATTR_IN: Final = struct.Struct("=II")  # size (0: only how long it is), padding
GETXATTR_OUT: Final = GETXATTR_IN
RELEASE_IN: Final = struct.Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
INTERRUPT_IN: Final = struct.Struct("=Q")  # unique of the interrupted request
INIT_IN: Final = struct.Struct("=IIIII44x")  # major, minor, max_readahead, flags, flags2; rest reserved
SETATTR_VALID: Final = struct.Struct("=I")  # what a SETATTR request begins with: which attributes are set
WRITE_IN: Final = struct.Struct("=QQIIQII")  # fh, offset, size, write_flags, lock_owner, flags, padding
OPEN_IN: Final = struct.Struct("=II")  # flags, open_flags
CREATE_IN: Final = struct.Struct("=IIII")  # flags, mode, umask, open_flags; then the name
OPEN_OUT: Final = struct.Struct("=QIi")  # fh, open_flags, backing_id
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHII24x")  # major, minor, max_readahead, flags, max_background,
# congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2, max_stack_depth
FORGET_IN: Final = struct.Struct("=Q")  # nlookup
BATCH_FORGET_IN: Final = struct.Struct("=II")  # count, padding; then as many of
FORGET_ONE: Final = struct.Struct("=QQ")  # nodeid, nlookup

_ENTRY_HEAD: Final = struct.Struct("=QQQQII")  # nodeid, generation, timeouts of entry and attributes: s, then ns
_ATTR_HEAD: Final = struct.Struct("=QII")  # timeout of the attributes: s, ns; padding
_ATTRIBUTES: Final = struct.Struct(
    "=QQQqqqIIIIIIIIII"
)  # struct fuse_attr: ino, size, blocks, times (s, then ns), mode,
# nlink, uid, gid, rdev, blksize, flags. Times before 1970 are negative.
_STATX_HEAD: Final = struct.Struct("=QII16x")  # timeout of the attributes: s, ns; flags
_STATX: Final = struct.Struct("=IIQIIIHHQQQQqIiqIiqIiqIiIIII112x")  # struct fuse_statx: mask, blksize, attributes,
# nlink, uid, gid, mode, ino, size, blocks, attributes_mask; atime, btime, ctime, mtime (s, ns, reserved); rdev, dev
_STATX_BASIC_AND_BTIME: Final = 0xFFF
_SECOND: Final = 1_000_000_000
#: struct fuse_entry_out that says: there is nothing of that name, and you may remember that
NO_ENTRY: Final = _ENTRY_HEAD.pack(0, 0, FOREVER, 0, 0, 0) + bytes(_ATTRIBUTES.size)

FUSE_DONT_MASK: Final = 1 << 6
FUSE_HANDLE_KILLPRIV_V2: Final = 1 << 28
FUSE_INIT_EXT: Final = 1 << 30  # there is a flags2
FUSE_PASSTHROUGH_2: Final = 1 << 5  # FUSE_PASSTHROUGH (bit 37), as a bit of flags2
MAX_STACK_DEPTH: Final = 1  # the backing of a passthrough file must not itself be stacked
FATTR_KILL_SUIDGID: Final = 1 << 11
FUSE_WRITE_KILL_SUIDGID: Final = 1 << 2
FUSE_OPEN_KILL_SUIDGID: Final = 1 << 0

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NOFLUSH: Final = 1 << 5  # Linux 5.16
FOPEN_PASSTHROUGH: Final = 1 << 7

FUSE_DEV_IOC_BACKING_OPEN: Final = 0x4010E501
FUSE_DEV_IOC_BACKING_CLOSE: Final = 0x4004E502
BACKING_MAP: Final = struct.Struct("=iIQ")  # struct fuse_backing_map: fd, flags, padding

# linux/fs.h: chattr(1), as far as flags mean nothing but to those who read them
FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IOC_FSGETXATTR: Final = 0x801C581F

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


def invalidate_attributes(nodeid: int) -> bytes:
    """Not an answer but FUSE_NOTIFY_INVAL_INODE: the kernel must ask for an inode's attributes again."""
    payload = _INVAL_INODE.pack(nodeid, -1, 0)  # a negative offset: nothing of the page cache
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), _FUSE_NOTIFY_INVAL_INODE, 0) + payload


def pack_entry(stat: Stat) -> bytes:
    """struct fuse_entry_out for an inode: its name may be believed, its attributes if they are stable."""
    attr_timeout = FOREVER if stat.stable else 0
    return _ENTRY_HEAD.pack(stat.ino, 0, FOREVER, attr_timeout, 0, 0) + _pack_attributes(stat)


def pack_attr(stat: Stat) -> bytes:
    """struct fuse_attr_out for an inode."""
    return _ATTR_HEAD.pack(FOREVER if stat.stable else 0, 0, 0) + _pack_attributes(stat)


def pack_statx(stat: Stat) -> bytes:
    """struct fuse_statx_out for an inode: all that fuse_attr_out says, and when it was made."""
    times = (
        part for time_ns in (stat.atime_ns, stat.btime_ns, stat.ctime_ns, stat.mtime_ns) for part in _timestamp(time_ns)
    )
    device = os.major(stat.rdev), os.minor(stat.rdev)
    return _STATX_HEAD.pack(FOREVER if stat.stable else 0, 0, 0) + _STATX.pack(
        *(_STATX_BASIC_AND_BTIME, PAGE_SIZE, 0, stat.nlink, stat.uid, stat.gid, stat.mode, 0),
        *(stat.ino, stat.size, stat.blocks, 0, *times, *device, 0, 0),
    )


def _timestamp(time_ns: int) -> tuple[int, int, int]:
    return (*divmod(time_ns, _SECOND), 0)


def _pack_attributes(stat: Stat) -> bytes:
    atime, atime_ns = divmod(stat.atime_ns, _SECOND)
    mtime, mtime_ns = divmod(stat.mtime_ns, _SECOND)
    ctime, ctime_ns = divmod(stat.ctime_ns, _SECOND)
    return _ATTRIBUTES.pack(
        *(stat.ino, stat.size, stat.blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns),
        *(stat.mode, stat.nlink, stat.uid, stat.gid, stat.rdev, PAGE_SIZE, 0),
    )


def error_reply(unique: int, errno: int) -> bytes:
    """A refusal."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)
