"""How many inodes there may be, as tmpfs counts them (mm/shmem.c: shmem_reserve_inode(), shmem_xattr_handler_set()).

A second name of a file takes an inode's space, too, and so do extended attributes in the user namespace.

All others (ACLs, capabilities, what is trusted) tmpfs does not count. But ACLs any user can set, and what is written
down of them is memory that nobody would limit. So they have as much space again, all of them together, which is more
than what is in use anywhere: a kibibyte for each inode. With that, what the state's log holds is limited by nr_inodes,
and by the pages that long symbolic links have.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from memfs.state.journal import NO_JOURNAL, Journal
from memfs.tree.inode import Inode

_INODE_BYTES: Final = 1024  # BOGO_INODE_SIZE: what tmpfs counts for an inode
_XATTR_BYTES: Final = 40  # and for an attribute, besides its name and value (simple_xattr_space())
_USER: Final = b"user."
_LEAST_OTHER: Final = 1 << 20  # bytes of attributes that tmpfs does not count, on however small a mount


class InodeSpace:
    """The space that a tree's inodes take, and its limit: `nr_inodes`, the root included.

    Nothing gets space either where the journal has none.
    """

    def __init__(self, nr_inodes: int, journal: Journal = NO_JOURNAL) -> None:
        self._journal: Final = journal
        self.nr_inodes = nr_inodes
        self._inodes = 0
        self._extra_links = 0  # names of files beyond the first
        self._user_xattr_bytes = 0
        self._other_xattr_bytes = 0

    @property
    def free_inodes(self) -> int:
        """How many inodes can still be created."""
        return self._free_bytes // _INODE_BYTES

    @property
    def _free_bytes(self) -> int:
        return (self.nr_inodes - self._inodes - self._extra_links) * _INODE_BYTES - self._user_xattr_bytes

    @property
    def free_other_bytes(self) -> int:
        """How many bytes of attributes there may still be that are not in the user namespace."""
        return max(self.nr_inodes * _INODE_BYTES, _LEAST_OTHER) - self._other_xattr_bytes

    def check_limit(self, nr_inodes: int) -> None:
        """Raise OSError(EINVAL) for a limit below what is in use."""
        in_use = self.nr_inodes - self.free_inodes
        if nr_inodes < in_use:
            raise OSError(errno.EINVAL, f"{in_use} inodes are in use")

    def set_limit(self, nr_inodes: int) -> None:
        """Change the limit. Raises OSError(EINVAL), changing nothing, below what is in use."""
        self.check_limit(nr_inodes)
        self.nr_inodes = nr_inodes

    def check_inode(self) -> None:
        """Raise OSError(ENOSPC) unless there is space for another inode, or another name of one."""
        if self._free_bytes < _INODE_BYTES:
            raise OSError(errno.ENOSPC, f"all {self.nr_inodes} inodes are in use")
        self._journal.check_space()

    def add_inode(self) -> None:
        """Count an inode that was created."""
        self._inodes += 1

    def remove_inode(self) -> None:
        """Count an inode that was freed."""
        self._inodes -= 1

    def add_extra_link(self) -> None:
        """Count a name of a file that has another."""
        self._extra_links += 1

    def remove_extra_link(self) -> None:
        """Count a name that was removed from a file that has another."""
        self._extra_links -= 1

    def change_xattr(self, name: bytes, old: bytes | None, new: bytes | None) -> None:
        """Count a new value of an extended attribute in place of an old one; None is no attribute.

        Raises OSError(ENOSPC), changing nothing.
        """
        is_user = name.startswith(_USER)
        more = _bytes(name, new) - _bytes(name, old)
        if more > 0:
            if more > (self._free_bytes if is_user else self.free_other_bytes):
                raise OSError(errno.ENOSPC, "no space for attributes")
            self._journal.check_space()
        if is_user:
            self._user_xattr_bytes += more
        else:
            self._other_xattr_bytes += more

    def add_xattrs(self, xattrs: Mapping[bytes, bytes]) -> None:
        """Count the ACLs with which an inode begins. Raises OSError(ENOSPC), changing nothing."""
        if not xattrs:
            return
        _, nbytes = _all_bytes(xattrs)
        if nbytes > self.free_other_bytes:
            raise OSError(errno.ENOSPC, "no space for ACLs")
        self._other_xattr_bytes += nbytes

    def remove_xattrs(self, xattrs: Mapping[bytes, bytes] | None) -> None:
        """Count the extended attributes of an inode that was freed."""
        if xattrs:
            user_bytes, other_bytes = _all_bytes(xattrs)
            self._user_xattr_bytes -= user_bytes
            self._other_xattr_bytes -= other_bytes

    def count(self, inodes: Collection[Inode], others: int = 0, other_links: int = 0) -> None:
        """Count the space that all inodes take: these, and others without attributes that have so many extra links."""
        self._inodes = len(inodes) + others
        links = sum(inode.nlink - 1 for inode in inodes if inode.nlink and not inode.is_dir)
        self._extra_links = links + other_links
        self._user_xattr_bytes, self._other_xattr_bytes = _bytes_of_all(inodes)

    def check(self, inodes: Iterable[Inode]) -> None:
        """Raise AssertionError unless these inodes are what was counted."""
        inodes = list(inodes)
        assert self._free_bytes >= 0, "more inodes and attributes than allowed"
        assert self._inodes == len(inodes), f"{self._inodes} inodes counted, {len(inodes)} there"
        links = sum(inode.nlink - 1 for inode in inodes if inode.nlink and not inode.is_dir)
        assert self._extra_links == links, f"{self._extra_links} extra links counted, {links} there"
        counted = self._user_xattr_bytes, self._other_xattr_bytes
        there = _bytes_of_all(inodes)
        assert counted == there, f"{counted} bytes of attributes counted, {there} there"


def _bytes(name: bytes, value: bytes | None) -> int:
    return _XATTR_BYTES + len(name) + len(value) if value is not None else 0


def _all_bytes(xattrs: Mapping[bytes, bytes]) -> tuple[int, int]:
    """Return the space of attributes in the user namespace, and of all others. There may be thousands."""
    user_bytes = other_bytes = 0
    for name, value in xattrs.items():
        if name.startswith(_USER):
            user_bytes += _XATTR_BYTES + len(name) + len(value)
        else:
            other_bytes += _XATTR_BYTES + len(name) + len(value)
    return user_bytes, other_bytes


def _bytes_of_all(inodes: Iterable[Inode]) -> tuple[int, int]:
    each = [_all_bytes(inode.xattrs) for inode in inodes if inode.xattrs]
    return sum(user_bytes for user_bytes, _ in each), sum(other_bytes for _, other_bytes in each)
