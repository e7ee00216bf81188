"""What the flags +i (immutable) and +a (append only) of chattr(1) forbid, each with EPERM.

For a filesystem of its own the kernel checks them itself (may_delete(), may_open(), notify_change(),
xattr_permission(), vfs_fallocate()). For a FUSE server it does not, so they are checked here. Who may set the flags
is checked by the kernel (vfs_fileattr_set()).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE
from memfs.tree.inode import Inode

FS_IMMUTABLE_FL: Final = 0x10  # linux/fs.h
FS_APPEND_FL: Final = 0x20
_EITHER: Final = FS_IMMUTABLE_FL | FS_APPEND_FL


def check_open(inode: Inode, flags: int) -> None:
    """Check open(2) with these O_* flags: an append-only file may be opened to append."""
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    if writes or flags & os.O_TRUNC:
        _forbid(inode, FS_IMMUTABLE_FL, "opened for writing")
    if (writes and not flags & os.O_APPEND) or flags & os.O_TRUNC:
        _forbid(inode, FS_APPEND_FL, "opened for writing other than to append")


def check_change(inode: Inode) -> None:
    """Check a change of attributes, links or size."""
    _forbid(inode, _EITHER, "changed")


def check_touch(inode: Inode) -> None:
    """Check utimensat(2) with UTIME_NOW for both times."""
    _forbid(inode, FS_IMMUTABLE_FL, "changed")


def check_fallocate(inode: Inode, mode: int) -> None:
    """Check fallocate(2): memory of an append-only file can be allocated, and not freed."""
    _forbid(inode, FS_IMMUTABLE_FL, "allocated")
    if mode & ~FALLOC_FL_KEEP_SIZE:
        _forbid(inode, FS_APPEND_FL, "punched")


def check_own(inode: Inode) -> None:
    """Check a registration: an owner may do anything to the content."""
    _forbid(inode, _EITHER, "owned")


def check_add(directory: Inode) -> None:
    """Check a new name in a directory."""
    _forbid(directory, FS_IMMUTABLE_FL, "added to")


def check_remove(directory: Inode, inode: Inode) -> None:
    """Check the removal of a name in a directory."""
    _forbid(directory, _EITHER, "removed from")
    _forbid(inode, _EITHER, "removed or renamed")


def _forbid(inode: Inode, flags: int, what: str) -> None:
    if inode.flags & flags:
        kind = "immutable" if inode.flags & flags & FS_IMMUTABLE_FL else "append-only"
        raise OSError(errno.EPERM, f"{kind}: cannot be {what}")
