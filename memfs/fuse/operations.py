"""pyfuse3's operations, translated one by one onto tree, handles, attributes and file.

Nothing is decided here. OSError becomes an errno for the kernel in one place (`_translated`); an exception of any
other kind is a bug, is logged with its traceback and answered with EIO, and the daemon goes on.

What is asked for most often never comes here but is answered by the channel's own handlers, in fuse/names.py; so are
the requests that pyfuse3 does not know, in fuse/requests.py. What the kernel may cache is said in the former.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileNameT, FlagT, InodeT, ModeT, RequestContext, XAttrNameT

from memfs.contract.logs import fields as log_fields
from memfs.contract.logs import working_on
from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.store.backing import Backing
from memfs.tree.inode import DOT_COOKIE, DOTDOT_COOKIE, FOREVER, Inode, RegularFile, Symlink, TimedInode
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import NAME_MAX, Tree
from memfs.tree.xattrs import Xattrs

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _translated(method: Callable[_P, Awaitable[_T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The one place where exceptions become errnos."""

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
    """What pyfuse3 calls."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(
        self, tree: Tree, handles: OpenFiles, attributes: Xattrs, backing: Backing, *, noatime: bool = False
    ) -> None:
        super().__init__()
        self._tree: Final = tree
        self._handles: Final = handles
        self._attributes: Final = attributes
        self._backing: Final = backing
        self._noatime: Final = noatime

    # -- inodes -----------------------------------------------------------------------------------------------------

    @_translated
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._tree.inode(inode)
        if fields.update_mode and isinstance(node, RegularFile):
            node.file.check_chmod(node.mode, attr.st_mode)
        if fields.update_size:
            if isinstance(node, RegularFile) and node.file.owner is not None:
                log.info("truncate", extra=log_fields(ino=inode, size=attr.st_size, pid=ctx.pid, uid=ctx.uid))
            await self._tree.regular(inode).file.truncate(attr.st_size, by_path=fh is None)
        if fields.update_mode:
            node.chmod(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        if fields.update_atime or fields.update_mtime:
            node.set_times(
                attr.st_atime_ns if fields.update_atime else None, attr.st_mtime_ns if fields.update_mtime else None
            )
        if not fields.update_size:  # what a new size does to the times has been done
            node.changed()
        return _attributes_of(node)

    @_translated
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        node = self._tree.inode(inode)
        if not isinstance(node, Symlink):
            raise OSError(errno.EINVAL, "not a symbolic link")
        self._accessed(node)
        return FileNameT(node.target)

    @_translated
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        await self._backing.reaper.drain()
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = reply.f_frsize = PAGE_SIZE
        reply.f_blocks = self._backing.total_pages
        reply.f_bfree = reply.f_bavail = self._backing.free_pages
        reply.f_files = self._tree.space.nr_inodes
        reply.f_ffree = reply.f_favail = self._tree.space.free_inodes
        reply.f_namemax = NAME_MAX
        return reply

    # -- names ------------------------------------------------------------------------------------------------------

    @_translated
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._make(parent_inode, name, mode, ctx, rdev))

    @_translated
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._make(parent_inode, name, mode, ctx))

    @_translated
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._tree.symlink(parent_inode, name, target, ctx.uid, ctx.gid))

    @_translated
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._tree.link(inode, new_parent_inode, new_name))

    @_translated
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
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
        self._tree.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, uid=ctx.uid, gid=ctx.gid)

    # -- directories ------------------------------------------------------------------------------------------------

    @_translated
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        handle = self._handles.directory(fh)
        if not handle.flags & os.O_NOATIME:
            self._accessed(handle.inode)
        for cookie, name, inode in (
            (DOT_COOKIE, b".", handle.inode),
            (DOTDOT_COOKIE, b"..", handle.inode.parent),
        ):
            # The kernel does not count these as look-ups.
            if start_id < cookie and not pyfuse3.readdir_reply(token, FileNameT(name), _attributes_of(inode), cookie):
                return
        for entry in handle.entries_after(start_id):
            attributes = _attributes_of(entry.inode)
            if not pyfuse3.readdir_reply(token, FileNameT(entry.name), attributes, entry.cookie):
                return
            entry.inode.nlookup += 1

    # -- regular files ----------------------------------------------------------------------------------------------

    @_translated
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self._handles.file(fh).inode.file.read(ByteOffset(off), size)

    @_translated
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return self._handles.file(fh).inode.file.write(ByteOffset(off), buf)

    # -- extended attributes ----------------------------------------------------------------------------------------

    @_translated
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        await self._attributes.set(inode, name, value, uid=ctx.uid)

    @_translated
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """The kernel is answered by fuse/names.py; this is what pyfuse3 asks before setxattr(2) with XATTR_CREATE."""
        return self._attributes.get(inode, name)

    @_translated
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [XAttrNameT(name) for name in self._attributes.list(inode, uid=ctx.uid)]

    @_translated
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        self._attributes.remove(inode, name)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _make(self, parent: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext, rdev: int = 0) -> Inode:
        seals = self._attributes.default_seals(parent) if stat.S_ISREG(mode) else 0
        return self._tree.create(parent, name, mode, ctx.uid, ctx.gid, umask=ctx.umask, rdev=rdev, seals=seals)

    def _accessed(self, inode: TimedInode) -> None:
        if not self._noatime:
            inode.accessed()

    def _entry(self, inode: Inode) -> EntryAttributes:
        """A reply that the kernel counts as a look-up."""
        inode.nlookup += 1
        return _attributes_of(inode)


def _attributes_of(inode: Inode) -> EntryAttributes:
    stat_ = inode.stat()
    entry = EntryAttributes()
    entry.st_ino = InodeT(stat_.ino)
    entry.st_mode = ModeT(stat_.mode)
    entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev = stat_.nlink, stat_.uid, stat_.gid, stat_.rdev
    entry.st_size, entry.st_blocks, entry.st_blksize = stat_.size, stat_.blocks, PAGE_SIZE
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = stat_.atime_ns, stat_.mtime_ns, stat_.ctime_ns
    entry.entry_timeout = FOREVER
    entry.attr_timeout = FOREVER if stat_.stable else 0
    return entry
