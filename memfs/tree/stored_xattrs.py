"""Extended attributes as they are stored with an inode, whatever they mean (xattrs.py says that).

Each is written down by itself, for they may be many and long. How much space they take is counted as tmpfs does
(inode_space.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from memfs.contract.sys.constants import XATTR_NAME_MAX, XATTR_SIZE_MAX
from memfs.state.journal import INODE, Journal
from memfs.tree import inode_flags, records
from memfs.tree.inode import Inode
from memfs.tree.inode_space import InodeSpace

MOST_XATTRS: Final = 8192  #: of an inode: to free them takes a millisecond


class StoredXattrs:
    """The extended attributes of a tree's inodes. Methods raise OSError with the errno that tmpfs gives."""

    def __init__(self, space: InodeSpace, journal: Journal) -> None:
        self._space: Final = space
        self._journal: Final = journal

    def set(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Set an extended attribute, as setxattr(2). ENOSPC also if there are MOST_XATTRS already."""
        inode_flags.check_change(inode)
        if len(name) > XATTR_NAME_MAX:
            raise OSError(errno.ERANGE, "attribute name too long")
        if len(value) > XATTR_SIZE_MAX:
            raise OSError(errno.E2BIG, "attribute too large")
        xattrs = inode.xattrs if inode.xattrs is not None else {}
        if name not in xattrs and len(xattrs) >= MOST_XATTRS:
            raise OSError(errno.ENOSPC, f"there are {MOST_XATTRS} attributes")
        self._space.change_xattr(name, xattrs.get(name), value)
        xattrs[name] = value
        inode.xattrs = xattrs
        self.changed(inode, name)
        self._touch(inode)

    def get(self, inode: Inode, name: bytes) -> bytes:
        """Return an extended attribute, as getxattr(2)."""
        try:
            return (inode.xattrs or {})[name]
        except KeyError:
            raise OSError(errno.ENODATA, "no such attribute") from None

    def remove(self, inode: Inode, name: bytes) -> None:
        """Remove an extended attribute, as removexattr(2)."""
        inode_flags.check_change(inode)
        self.drop(inode, name, self.get(inode, name))
        self._touch(inode)

    def drop(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Remove an extended attribute that has this value, and leave the inode's times alone."""
        self._space.change_xattr(name, value, None)
        assert inode.xattrs is not None
        del inode.xattrs[name]
        self.changed(inode, name)

    def names(self, inode: Inode) -> Iterable[bytes]:
        """Return the names of extended attributes, as listxattr(2)."""
        return inode.xattrs or ()

    def changed(self, inode: Inode, name: bytes) -> None:
        """Note that an extended attribute has changed, other than by a method of this class."""
        self._journal.changed(records.XATTR, inode.ino, name)

    def _touch(self, inode: Inode) -> None:
        inode.changed()
        self._journal.changed(INODE, inode.ino)
