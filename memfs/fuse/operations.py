"""What pyfuse3 still answers: links, directories and special files, created, renamed and removed.

Each is translated onto the tree; nothing is decided here, and nothing waits. OSError becomes an errno for the kernel in
one place (`_translated`); an exception of any other kind is a bug, is logged with its traceback and answered with EIO,
and the daemon goes on.
"""

from __future__ import annotations

import errno
import functools
import logging
import stat
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileNameT, FlagT, InodeT, ModeT, RequestContext

from memfs.contract.logs import working_on
from memfs.fuse.reply import entry_attributes
from memfs.tree.access_times import AccessTimes
from memfs.tree.inode import Inode, Symlink
from memfs.tree.tree import Tree
from memfs.tree.xattrs import Xattrs

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _translated(method: Callable[_P, Awaitable[_T]]) -> Callable[_P, Coroutine[object, object, _T]]:
    """Turn exceptions into errnos; this is the one place that does."""

    @functools.wraps(method)
    async def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            with working_on():
                return await method(*args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            log.exception("%s failed", method.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return wrapper


class Operations(pyfuse3.Operations):
    """The operations that pyfuse3 calls. `access_times`: whether reading a link sets its own."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, tree: Tree, xattrs: Xattrs, access_times: AccessTimes) -> None:
        super().__init__()
        self._tree: Final = tree
        self._xattrs: Final = xattrs
        self._access_times: Final = access_times

    @_translated
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """Answer readlink(2)."""
        node = self._tree.inode(inode)
        if not isinstance(node, Symlink):
            raise OSError(errno.EINVAL, "not a symbolic link")
        self._access_times.read(node)
        return FileNameT(node.target)

    @_translated
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Answer mknod(2)."""
        return self._entry(self._make(parent_inode, name, mode, ctx, rdev))

    @_translated
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        """Answer mkdir(2)."""
        return self._entry(self._make(parent_inode, name, mode, ctx))

    @_translated
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Answer symlink(2)."""
        return self._entry(self._tree.symlink(parent_inode, name, target, ctx.uid, ctx.gid))

    @_translated
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Answer link(2)."""
        return self._entry(self._tree.link(inode, new_parent_inode, new_name))

    @_translated
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Answer rmdir(2)."""
        self._tree.rmdir(parent_inode, name)

    @_translated
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        """Answer rename(2)."""
        self._tree.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, uid=ctx.uid, gid=ctx.gid)

    def _make(self, parent: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext, rdev: int = 0) -> Inode:
        seals = self._xattrs.default_seals(parent) if stat.S_ISREG(mode) else 0
        return self._tree.create(parent, name, mode, ctx.uid, ctx.gid, umask=ctx.umask, rdev=rdev, seals=seals)

    def _entry(self, inode: Inode) -> EntryAttributes:
        """Return a reply that the kernel counts as a look-up of the inode."""
        self._tree.looked_up(inode)
        return entry_attributes(inode.stat())
