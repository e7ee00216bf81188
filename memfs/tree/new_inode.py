"""What a new inode is: mode, group and ACLs follow from its directory, and a file has content from the beginning.

That is inode_init_owner() (fs/inode.c) and posix_acl_create() (fs/posix_acl.c) of the kernel, and what tmpfs does with
the target of a symbolic link (mm/shmem.c, shmem_symlink()).
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from memfs.contract.units import ByteOffset
from memfs.store.file import File
from memfs.tree import acl
from memfs.tree.inode import Directory, Ino, Inode, RegularFile, Special, Symlink

_SHORT_SYMLINK: Final = 128  # bytes, the final 0 among them (mm/shmem.c: SHORT_SYMLINK_LEN)

#: Creates the content of a new regular file, held, from its number and initial seals (F_SEAL_* bits)
NewFile = Callable[[Ino, int], File]


class NewInode(NamedTuple):
    """What a new inode is to be: `Tree.create` says more of it. `target` is a symbolic link's."""

    mode: int
    uid: int
    gid: int
    umask: int = 0
    rdev: int = 0
    seals: int = 0
    held: bool = False
    target: bytes = b""

    def inherit(self, parent: Directory) -> tuple[int, int, dict[bytes, bytes]]:
        """Return mode, group and ACLs that it gets in a directory."""
        mode, gid = self.mode, self.gid
        xattrs: dict[bytes, bytes] = {}
        if not stat.S_ISLNK(mode):
            mode, xattrs = acl.inherit(parent.xattrs, mode, self.umask)
        if parent.mode & stat.S_ISGID:
            gid = parent.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        return mode, gid, xattrs

    def make(self, ino: Ino, mode: int, gid: int, parent: Directory, new_file: NewFile) -> Inode:
        """Make it, with the mode and group that it inherits. Raises OSError: ENOSPC, EMFILE."""
        if stat.S_ISREG(mode):
            inode = RegularFile(ino, mode, self.uid, gid, new_file(ino, self.seals))
            if self.held:
                inode.holds = 1
            else:
                inode.file.release()
            return inode
        if stat.S_ISDIR(mode):
            return Directory(ino, mode, self.uid, gid, parent)
        if stat.S_ISLNK(mode):
            return Symlink(ino, mode, self.uid, gid, self.target, self._page(ino, new_file))
        return Special(ino, mode, self.uid, gid, self.rdev)

    def _page(self, ino: Ino, new_file: NewFile) -> File | None:
        """Return the memory of a symbolic link's target, if it is long. Raises OSError(ENOSPC)."""
        if len(self.target) < _SHORT_SYMLINK:
            return None
        page = new_file(ino, 0)
        try:
            page.write(ByteOffset(0), self.target)
        except OSError:
            page.release()
            page.close()
            raise
        page.release()
        return page
