"""The kernel's FUSE ABI (include/uapi/linux/fuse.h), as far as memfs speaks it itself: opcodes, structs, flags.

The ABI is stable and little more than structs; Debian's copy of the header is often older than the kernel it runs on,
so the numbers stand here. Everything is in host byte order, as the kernel writes it.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass
from typing import Final


class Opcode(enum.IntEnum):
    """All that the kernel asks for (enum fuse_opcode, Linux 6.18; those of virtiofs's DAX and of CUSE left out)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


IN_HEADER: Final = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extlen, padding
OUT_HEADER: Final = struct.Struct("=IiQ")  # len, -errno, unique
_INVAL_INODE: Final = struct.Struct("=Qqq")  # ino, offset, length
_FUSE_NOTIFY_INVAL_INODE: Final = 2
_RETRIEVE: Final = struct.Struct("=QQQI4x")  # unique of the answer, nodeid, offset, size
_FUSE_NOTIFY_RETRIEVE: Final = 5
NOTIFY_RETRIEVE_IN: Final = struct.Struct("=8xQI20x")  # offset, size; then the content
_FUSE_NOTIFY_RESEND: Final = 7  # Linux 6.9
RESENT: Final = 1 << 63  #: FUSE_UNIQUE_RESEND, in the number of a request that comes again
FALLOCATE_IN: Final = struct.Struct("=QQQII")  # fh, offset, length, mode, padding
LSEEK_IN: Final = struct.Struct("=QQII")  # fh, offset, whence, padding
LSEEK_OUT: Final = struct.Struct("=Q")  # offset
IOCTL_IN: Final = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
IOCTL_OUT: Final = struct.Struct("=iIII")  # result, flags, in_iovs, out_iovs
GETXATTR_IN: Final = struct.Struct("=II")  # size (0: only how long it is), padding
GETXATTR_OUT: Final = GETXATTR_IN  # and of LISTXATTR
SETXATTR_IN: Final = struct.Struct("=II")  # size of the value, flags; then the name and the value
SETXATTR_EXT_IN: Final = struct.Struct("=III4x")  # the same, and setxattr_flags, padding, with FUSE_SETXATTR_EXT
RELEASE_IN: Final = struct.Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
INTERRUPT_IN: Final = struct.Struct("=Q")  # unique of the interrupted request
INIT_IN: Final = struct.Struct("=IIIII44x")  # major, minor, max_readahead, flags, flags2; rest reserved
SETATTR_IN: Final = struct.Struct("=I4xQQ8xqq8xIIII4xII4x")  # valid (FATTR_*), fh, size, atime, mtime (s),
# atime, mtime, ctime (ns), mode, uid, gid; left out: lock_owner, ctime (s), padding
READ_IN: Final = struct.Struct("=QQIIQII")  # fh, offset (of a directory: cookie), size, read_flags, lock_owner, flags
WRITE_IN: Final = READ_IN  # fh, offset, size, write_flags, lock_owner, flags, padding; then the data
WRITE_OUT: Final = struct.Struct("=II")  # size, padding
STATFS_OUT: Final = struct.Struct("=QQQQQIII28x")  # struct fuse_kstatfs: blocks, bfree, bavail, files, ffree; bsize,
# namelen, frsize; spare
OPEN_IN: Final = struct.Struct("=II")  # flags, open_flags
CREATE_IN: Final = struct.Struct("=IIII")  # flags, mode, umask, open_flags; then the name
MKNOD_IN: Final = struct.Struct("=IIII")  # mode, rdev, umask, padding; then the name
MKDIR_IN: Final = struct.Struct("=II")  # mode, umask; then the name
LINK_IN: Final = struct.Struct("=Q")  # the inode's nodeid; then the new name, in the directory that the header says
RENAME_IN: Final = struct.Struct("=Q")  # the new directory's nodeid; then the old name and the new one
RENAME2_IN: Final = struct.Struct("=QII")  # the same, with flags and padding
OPEN_OUT: Final = struct.Struct("=QIi")  # fh, open_flags, backing_id
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHII24x")  # major, minor, max_readahead, flags, max_background,
# congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2, max_stack_depth
FORGET_IN: Final = struct.Struct("=Q")  # nlookup
BATCH_FORGET_IN: Final = struct.Struct("=II")  # count, padding; then as many of
FORGET_ONE: Final = struct.Struct("=QQ")  # nodeid, nlookup

ENTRY_OUT: Final = struct.Struct("=QQQQII")  # nodeid, generation, timeouts of entry and attributes: s, then ns; then
# the attributes
ATTR_OUT: Final = struct.Struct("=QII")  # timeout of the attributes: s, ns; padding; then the attributes
ATTRIBUTES: Final = struct.Struct("=QQQqqqIIIIIIIIII")  # struct fuse_attr: ino, size, blocks, times (s, then ns), mode,
# nlink, uid, gid, rdev, blksize, flags. Times before 1970 are negative.
STATX_OUT: Final = struct.Struct("=QII16x")  # timeout of the attributes: s, ns; flags; then
STATX: Final = struct.Struct("=IIQIIIHHQQQQqIiqIiqIiqIiIIII112x")  # struct fuse_statx: mask, blksize, attributes,
# nlink, uid, gid, mode, ino, size, blocks, attributes_mask; atime, btime, ctime, mtime (s, ns, reserved); rdev, dev
STATX_BASIC_STATS_AND_BTIME: Final = 0xFFF
DIRENT: Final = struct.Struct("=QQII")  # ino, cookie, length of the name, type (mode >> 12); then the name, then
DIRENT_ALIGN: Final = 8  # zeros up to a multiple of so many bytes

FUSE_DONT_MASK: Final = 1 << 6
FUSE_AUTO_INVAL_DATA: Final = 1 << 12
FUSE_HANDLE_KILLPRIV_V2: Final = 1 << 28
FUSE_INIT_EXT: Final = 1 << 30  # there is a flags2
FUSE_ALLOW_IDMAP_2: Final = 1 << 8  # FUSE_ALLOW_IDMAP (bit 40), Linux 6.12
FUSE_PASSTHROUGH_2: Final = 1 << 5  # FUSE_PASSTHROUGH (bit 37), as a bit of flags2
MAX_STACK_DEPTH: Final = 1  # the backing of a passthrough file must not itself be stacked
FUSE_SETXATTR_EXT: Final = 1 << 29  # SETXATTR_IN is longer (SETXATTR_EXT_IN), Linux 5.13
FUSE_SETXATTR_ACL_KILL_SGID: Final = 1 << 0  # in setxattr_flags

FATTR_MODE: Final = 1 << 0  # which attributes SETATTR sets
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6  # there is a file handle
FATTR_ATIME_NOW: Final = 1 << 7  # with FATTR_ATIME, and the time beside it
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_LOCKOWNER: Final = 1 << 9
FATTR_KILL_SUIDGID: Final = 1 << 11
FUSE_WRITE_CACHE: Final = 1 << 0
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
FS_IOC_FSSETXATTR: Final = 0x401C5820

MAX_WRITE: Final = 1 << 20  #: bytes in one WRITE request: the most that the kernel sends
BUFFER_SIZE: Final = MAX_WRITE + 4096  #: bytes: the largest request, header included


class Malformed(Exception):
    """Bytes from the kernel's side that are not a request."""


@dataclass(slots=True)
class Request:
    """One request of the kernel.

    `message` is a view into the buffer that the next request is read into. When a handler waits for the first time,
    `keep` has replaced it by a copy: what was cut out of `body` before is worth nothing then, `body` itself is.
    """

    message: memoryview  #: all of it
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    is_interrupted: bool = False  #: before its handler was called

    @classmethod
    def parse(cls, message: memoryview) -> Request:
        """Return the request that a message is. Raises Malformed."""
        if len(message) < IN_HEADER.size:
            raise Malformed(f"a request of {len(message)} bytes")
        length, opcode, unique, nodeid, uid, gid, pid, _, _ = IN_HEADER.unpack_from(message)
        if length != len(message):
            raise Malformed(f"a request of {len(message)} bytes that claims {length}")
        return cls(message, opcode, unique, nodeid, uid, gid, pid)

    @property
    def body(self) -> memoryview:
        """What follows the header."""
        return self.message[IN_HEADER.size :]

    @property
    def number(self) -> int:
        """Its number, the same when it comes again; `unique` is what the reply has to carry."""
        return self.unique & ~RESENT

    def keep(self) -> None:
        """Copy the message out of the buffer."""
        self.message = memoryview(bytes(self.message))


def unpack(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    """Return the fields that a request's body begins with. Raises Malformed if it is too short."""
    if len(body) < layout.size:
        raise Malformed(f"a body of {len(body)} bytes instead of {layout.size}")
    return layout.unpack_from(body)


def unpack_name(data: memoryview) -> bytes:
    """Return the name that the rest of a request is: it ends with a zero byte. Raises Malformed or OSError(EINVAL)."""
    name = bytes(data)
    if not name.endswith(b"\0"):
        raise Malformed("a name without an end")
    if len(name) == 1:
        raise OSError(errno.EINVAL, "an empty name")
    return name[:-1]


def unpack_names(data: memoryview) -> tuple[bytes, bytes]:
    """Return the two names that the rest of a request is. Raises Malformed or OSError(EINVAL)."""
    first, zero, second = bytes(data).partition(b"\0")
    return unpack_name(memoryview(first + zero)), unpack_name(memoryview(second))


def reply(unique: int, payload: bytes = b"") -> bytes:
    """Return the message that a request succeeded."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload


def error_reply(unique: int, error: int) -> bytes:
    """Return the message that a request failed with an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -error, unique)


def invalidate_attributes(nodeid: int) -> bytes:
    """Return FUSE_NOTIFY_INVAL_INODE, which answers nothing: the kernel must ask for an inode's attributes again."""
    payload = _INVAL_INODE.pack(nodeid, -1, 0)  # a negative offset: nothing of the page cache
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), _FUSE_NOTIFY_INVAL_INODE, 0) + payload


def retrieve(unique: int, nodeid: int, offset: int, nbytes: int) -> bytes:
    """Return FUSE_NOTIFY_RETRIEVE: ask for what the page cache has of a file, up to the first page that it has not.

    The answer is a NOTIFY_REPLY request with this `unique`.
    """
    payload = _RETRIEVE.pack(unique, nodeid, offset, nbytes)
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), _FUSE_NOTIFY_RETRIEVE, 0) + payload


def resend() -> bytes:
    """Return FUSE_NOTIFY_RESEND: whatever was read and not answered is to come again."""
    return OUT_HEADER.pack(OUT_HEADER.size, _FUSE_NOTIFY_RESEND, 0)
