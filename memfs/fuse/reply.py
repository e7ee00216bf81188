"""What stat(2) tells of an inode, as the bytes that the kernel wants.

What the kernel may cache follows from who can change what. Names and attributes change only through this mount, so the
kernel, which has seen every request, may believe them for good, absent names included. Not so the block count of a file
with content: an owner, or a program that writes to a mapping, changes it and nobody is notified. The attributes of such
a file are asked for each time.
"""

from __future__ import annotations

import os
from stat import S_IFMT
from typing import Final

from memfs.fuse.abi import (
    ATTR_OUT,
    ATTRIBUTES,
    DIRENT,
    DIRENT_ALIGN,
    ENTRY_OUT,
    STATX,
    STATX_BASIC_STATS_AND_BTIME,
    STATX_OUT,
)
from memfs.tree.inode import FOREVER, Stat

_SECOND: Final = 1_000_000_000  # nanoseconds
#: struct fuse_entry_out that says: there is nothing of that name, and this may be cached
NO_ENTRY: Final = ENTRY_OUT.pack(0, 0, FOREVER, 0, 0, 0) + bytes(ATTRIBUTES.size)


def _timeout(stat: Stat) -> int:
    """Return for how many seconds the kernel may cache attributes."""
    return FOREVER if stat.stable else 0


def pack_entry(stat: Stat) -> bytes:
    """Return struct fuse_entry_out: an inode that a name was found to name."""
    return ENTRY_OUT.pack(stat.ino, 0, FOREVER, _timeout(stat), 0, 0) + _pack_attributes(stat)


def pack_attr(stat: Stat) -> bytes:
    """Return struct fuse_attr_out."""
    return ATTR_OUT.pack(_timeout(stat), 0, 0) + _pack_attributes(stat)


def pack_statx(stat: Stat) -> bytes:
    """Return struct fuse_statx_out: all that fuse_attr_out says, and when the inode was created."""
    times = (
        part for time_ns in (stat.atime_ns, stat.btime_ns, stat.ctime_ns, stat.mtime_ns) for part in _timestamp(time_ns)
    )
    device = os.major(stat.rdev), os.minor(stat.rdev)
    return STATX_OUT.pack(_timeout(stat), 0, 0) + STATX.pack(
        *(STATX_BASIC_STATS_AND_BTIME, stat.blksize, 0, stat.nlink, stat.uid, stat.gid, stat.mode, 0),
        *(stat.ino, stat.size, stat.blocks, 0, *times, *device, 0, 0),
    )


def pack_direntplus(name: bytes, stat: Stat, cookie: int) -> bytes:
    """Return struct fuse_direntplus: an entry of a directory, with what a look-up of it would tell."""
    dirent = DIRENT.pack(stat.ino, cookie, len(name), S_IFMT(stat.mode) >> 12)
    return pack_entry(stat) + dirent + name + bytes(-len(dirent + name) % DIRENT_ALIGN)


def _timestamp(time_ns: int) -> tuple[int, int, int]:
    return (*divmod(time_ns, _SECOND), 0)


def _pack_attributes(stat: Stat) -> bytes:
    ino, mode, nlink, uid, gid, rdev, size, blocks, atime_ns, mtime_ns, ctime_ns, _, _, blksize = stat
    atime, atime_ns = divmod(atime_ns, _SECOND)
    mtime, mtime_ns = divmod(mtime_ns, _SECOND)
    ctime, ctime_ns = divmod(ctime_ns, _SECOND)
    times = (atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns)
    return ATTRIBUTES.pack(ino, size, blocks, *times, mode, nlink, uid, gid, rdev, blksize, 0)
