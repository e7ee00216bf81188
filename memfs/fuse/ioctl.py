"""Answers to ioctl(2): seals on an open file, chattr(1)'s inode flags, and conversions.

The kernel does not know that an ioctl changes an inode, so it is made to ask for its attributes again. Those of files
that have pages it does not keep (inode.py), so after a conversion that is not necessary.

Where the shared file is open through the kernel's page cache, a conversion would have to take pages out of that, as
fallocate(2) does by itself. It is refused. To take a page out, the kernel waits until we have written it, or have read
it for somebody, so a thread of ours would wait for ourselves; and if we were killed, it could not end and would keep
/dev/fuse open, so that everybody who uses the mount waited for ever. The same goes for any process that has /dev/fuse.
Callers have not: they can call fallocate(2) of both files, and the kernel does it for them.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Callable
from typing import Final

from memfs.contract import conversion
from memfs.contract.conversion import Conversion, is_convert
from memfs.contract.logs import fields
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE
from memfs.fuse import abi
from memfs.fuse.abi import IOCTL_IN, IOCTL_OUT, Request, unpack
from memfs.fuse.caller import working_for_caller
from memfs.store import seals
from memfs.store.conversion import convert
from memfs.tree import inode_flags
from memfs.tree.open_files import Access, OpenFiles
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_FLAGS: Final = struct.Struct("=I")  # of FS_IOC_GETFLAGS and FS_IOC_SETFLAGS, whose numbers claim a long
_FSXATTR: Final = struct.Struct("=IIIII8x")  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize
#: FS_IMMUTABLE_FL, FS_APPEND_FL, FS_NODUMP_FL and FS_NOATIME_FL, and the same as FS_XFLAG_*
_XFLAGS: Final = {inode_flags.FS_IMMUTABLE_FL: 0x8, inode_flags.FS_APPEND_FL: 0x10, 0x40: 0x80, 0x80: 0x40}
_DONE: Final = IOCTL_OUT.pack(0, 0, 0, 0)  # the reply to a command that returns 0, before its data


class IoctlHandlers:
    """The channel's handler for ioctl(2). `changed` is called with the number of an inode that one has changed."""

    def __init__(self, tree: Tree, open_files: OpenFiles, changed: Callable[[int], None]) -> None:
        self._changed: Final = changed
        self._tree: Final = tree
        self._open_files: Final = open_files

    async def ioctl(self, request: Request) -> bytes:
        """Answer ioctl(2). ENOTTY: an unknown command, or no space for its result."""
        body = request.body
        fh, _, command, _, in_size, out_size = unpack(IOCTL_IN, body)
        data = body[IOCTL_IN.size : IOCTL_IN.size + in_size]
        if is_convert(command):
            await self._convert(request, fh, Conversion.unpack(data))
            return _DONE
        match command:
            case conversion.MEMFS_IOC_GET_KEY if out_size >= conversion.KEY.size:
                return _DONE + conversion.KEY.pack(self._open_files.key(fh))
            case seals.MEMFS_IOC_GET_SEALS if out_size >= seals.IOC_ARGUMENT.size:
                return _DONE + seals.IOC_ARGUMENT.pack(self._open_files.file(fh).inode.file.seals)
            case seals.MEMFS_IOC_ADD_SEALS:
                (bits,) = unpack(seals.IOC_ARGUMENT, data)
                await self._add_seals(fh, bits)
                self._changed(request.nodeid)
                return _DONE
            case abi.FS_IOC_GETFLAGS if out_size >= _FLAGS.size:
                return _DONE + _FLAGS.pack(self._tree.inode(request.nodeid).flags)
            case abi.FS_IOC_SETFLAGS:
                (flags,) = unpack(_FLAGS, data)
                self._set_flags(request.nodeid, flags)
                return _DONE
            case abi.FS_IOC_FSSETXATTR:
                self._set_fsxattr(request.nodeid, data)
                return _DONE
            case abi.FS_IOC_FSGETXATTR if out_size >= _FSXATTR.size:
                flags = self._tree.inode(request.nodeid).flags
                xflags = sum(xflag for flag, xflag in _XFLAGS.items() if flags & flag)
                return _DONE + _FSXATTR.pack(xflags, 0, 0, 0, 0)
        raise OSError(errno.ENOTTY, f"ioctl {command:#x}")

    async def _add_seals(self, fh: int, bits: int) -> None:
        handle = self._open_files.file(fh)
        if not handle.may_seal:
            raise OSError(errno.EPERM, "not open for writing")
        await handle.inode.file.add_seals(bits)
        handle.inode.changed()
        self._tree.changed(handle.inode)

    async def _convert(self, request: Request, fh: int, asked: Conversion) -> None:
        private, shared = self._open_files.file(fh), self._open_files.by_key(asked.key)
        if not private.writable:
            raise OSError(errno.EBADF, "not open for writing")
        if shared.access is Access.CACHED:
            raise OSError(errno.EOPNOTSUPP, "the shared file is open through the page cache; use fallocate(2) of both")
        comes, leaves = (private, shared) if asked.to_private else (shared, private)
        if comes.inode.flags or leaves.inode.flags:
            inode_flags.check_fallocate(comes.inode, FALLOC_FL_KEEP_SIZE)
            inode_flags.check_fallocate(leaves.inode, PUNCH_HOLE)
        if log.isEnabledFor(logging.INFO):
            inodes = {"ino": private.inode.ino, "shared": shared.inode.ino, "to_private": asked.to_private}
            log.info("convert", extra=fields(**inodes, pages=asked.ranges, pid=request.pid, uid=request.uid))
        self._tree.hold(shared.inode)  # its handle may be closed meanwhile
        try:
            with working_for_caller(request):
                await convert(
                    *(shared.inode.file, private.inode.file, asked.ranges),
                    to_private=asked.to_private,
                    preserve=asked.preserve,
                )
        finally:
            self._tree.release(shared.inode)

    def _set_flags(self, nodeid: int, flags: int) -> None:
        inode = self._tree.inode(nodeid)
        if flags & ~sum(_XFLAGS):
            raise OSError(errno.EOPNOTSUPP, f"inode flags {flags:#x}")
        inode.set_flags(flags)
        self._tree.changed(inode)
        self._changed(nodeid)

    def _set_fsxattr(self, nodeid: int, data: memoryview) -> None:
        """Set flags by their other names. EOPNOTSUPP, as on tmpfs: extents of a certain size, and projects."""
        xflags, extsize, _, projid, cowextsize = unpack(_FSXATTR, data)
        if xflags & ~sum(_XFLAGS.values()) or extsize or projid or cowextsize:
            raise OSError(errno.EOPNOTSUPP, f"extended flags {xflags:#x}")
        self._set_flags(nodeid, sum(flag for flag, xflag in _XFLAGS.items() if xflags & xflag))
