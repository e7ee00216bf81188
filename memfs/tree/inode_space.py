"""How many inodes there may be, as tmpfs counts them (mm/shmem.c: shmem_reserve_inode(), shmem_xattr_handler_set()).

A second name of a file takes an inode's space, too, and so do extended attributes in the user namespace.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from memfs.tree.inode import Inode

_INODE_BYTES: Final = 1024  # BOGO_INODE_SIZE: what tmpfs counts for an inode


class InodeSpace:
    """The space that a tree's inodes take, and its limit: `nr_inodes`, the root included."""

    def __init__(self, nr_inodes: int) -> None:
        self.nr_inodes = nr_inodes
        self._inodes = 0
        self._extra_links = 0  # names of files beyond the first
        self._user_xattr_bytes = 0

    @property
    def free_inodes(self) -> int:
        """How many inodes can still be created."""
        return self._free_bytes // _INODE_BYTES

    @property
    def _free_bytes(self) -> int:
        return (self.nr_inodes - self._inodes - self._extra_links) * _INODE_BYTES - self._user_xattr_bytes

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
        more = _user_bytes(name, new) - _user_bytes(name, old)
        if more > 0 and more > self._free_bytes:
            raise OSError(errno.ENOSPC, "no space for attributes")
        self._user_xattr_bytes += more

    def remove_xattrs(self, xattrs: Mapping[bytes, bytes] | None) -> None:
        """Count the extended attributes of an inode that was freed."""
        self._user_xattr_bytes -= _all_user_bytes(xattrs)

    def count(self, inodes: Collection[Inode]) -> None:
        """Count the space that these inodes take, which are all."""
        self._inodes = len(inodes)
        self._extra_links = sum(inode.nlink - 1 for inode in inodes if inode.nlink and not inode.is_dir)
        self._user_xattr_bytes = sum(_all_user_bytes(inode.xattrs) for inode in inodes)

    def check(self, inodes: Iterable[Inode]) -> None:
        """Raise AssertionError unless these inodes are what was counted."""
        inodes = list(inodes)
        assert self._free_bytes >= 0, "more inodes and attributes than allowed"
        assert self._inodes == len(inodes), f"{self._inodes} inodes counted, {len(inodes)} there"
        links = sum(inode.nlink - 1 for inode in inodes if inode.nlink and not inode.is_dir)
        assert self._extra_links == links, f"{self._extra_links} extra links counted, {links} there"
        nbytes = sum(_all_user_bytes(inode.xattrs) for inode in inodes)
        assert self._user_xattr_bytes == nbytes, f"{self._user_xattr_bytes} bytes of attributes counted, {nbytes} there"


def _user_bytes(name: bytes, value: bytes | None) -> int:
    """Return the space that tmpfs counts for an attribute, if it is in the user namespace (simple_xattr_space())."""
    return 40 + len(name) + len(value) if value is not None and name.startswith(b"user.") else 0


def _all_user_bytes(xattrs: Mapping[bytes, bytes] | None) -> int:
    return sum(_user_bytes(name, value) for name, value in (xattrs or {}).items())
