"""Answers to requests on inodes and open files: opening and closing them, their attributes, content and pages.

These requests carry no name, but the number of an inode and, for an open file, of its handle.

Where there is no cache there is nothing to flush, and close(2) need not ask (FOPEN_NOFLUSH): a daemon killed while it
had a descriptor of its own mount would otherwise wait, in exit(2), for an answer of its own.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from contextlib import nullcontext
from typing import Final

from memfs.contract.aio.threads import Threads
from memfs.contract.logs import fields
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE
from memfs.contract.units import MAX_OFFSET, PAGE_SIZE, ByteOffset
from memfs.fuse.abi import (
    FALLOCATE_IN,
    FATTR_ATIME,
    FATTR_ATIME_NOW,
    FATTR_FH,
    FATTR_GID,
    FATTR_KILL_SUIDGID,
    FATTR_LOCKOWNER,
    FATTR_MODE,
    FATTR_MTIME,
    FATTR_MTIME_NOW,
    FATTR_SIZE,
    FATTR_UID,
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FOPEN_NOFLUSH,
    FOPEN_PASSTHROUGH,
    FUSE_OPEN_KILL_SUIDGID,
    FUSE_WRITE_CACHE,
    FUSE_WRITE_KILL_SUIDGID,
    LSEEK_IN,
    LSEEK_OUT,
    MAX_WRITE,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    RELEASE_IN,
    SETATTR_IN,
    STATFS_OUT,
    WRITE_IN,
    WRITE_OUT,
    Malformed,
    Request,
    unpack,
)
from memfs.fuse.caller import Callers, is_in_group_or_capable, working_for_caller
from memfs.fuse.page_cache import PageCache
from memfs.fuse.reply import pack_attr, pack_statx
from memfs.store.backing import Backing
from memfs.store.chunks import LONG, SHORT
from memfs.tree import inode_flags
from memfs.tree.inode import Inode, RegularFile, Stat
from memfs.tree.open_files import Access, OpenFiles
from memfs.tree.tree import NAME_MAX, Tree

log = logging.getLogger(__name__)

_NEEDS_NO_THREAD: Final = nullcontext()
_NOT_TIMES: Final = FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_SIZE
_TIMES: Final = FATTR_ATIME | FATTR_MTIME
_TIMES_TO_NOW: Final = _TIMES | FATTR_ATIME_NOW | FATTR_MTIME_NOW


class FileHandlers:
    """The channel's handlers for inodes and open files. Each raises OSError with the errno to answer."""

    def __init__(self, tree: Tree, open_files: OpenFiles, backing: Backing, page_cache: PageCache) -> None:
        self._tree: Final = tree
        self._open_files: Final = open_files
        self._backing: Final = backing
        self.page_cache: Final = page_cache

    # -- attributes -------------------------------------------------------------------------------------------------

    async def getattr(self, request: Request) -> bytes:
        """Answer stat(2)."""
        return pack_attr(await self._stat(request))

    async def statx(self, request: Request) -> bytes:
        """Answer statx(2)."""
        return pack_statx(await self._stat(request))

    async def _stat(self, request: Request) -> Stat:
        """Return what stat(2) tells, with the blocks that only the page cache has."""
        inode = self._tree.inode(request.nodeid)
        if not isinstance(inode, RegularFile):
            return inode.stat()
        in_cache = await self.page_cache.blocks(inode)
        status = inode.stat()
        return status._replace(blocks=status.blocks + in_cache) if in_cache else status

    async def setattr(self, request: Request) -> bytes:
        """Answer chmod(2), chown(2), truncate(2) and utimensat(2)."""
        valid, _, size, atime, mtime, atime_ns, mtime_ns, _, mode, uid, gid = unpack(SETATTR_IN, request.body)
        inode = self._tree.inode(request.nodeid)
        if valid & _TIMES_TO_NOW == _TIMES_TO_NOW and not valid & _NOT_TIMES:
            inode_flags.check_touch(inode)
        elif valid & (_NOT_TIMES | _TIMES_TO_NOW):
            inode_flags.check_change(inode)
        if valid & FATTR_KILL_SUIDGID or not valid & ~(FATTR_FH | FATTR_LOCKOWNER):
            self._kill_suidgid(inode, request)
        if valid & FATTR_MODE and isinstance(inode, RegularFile):
            inode.file.check_chmod(inode.mode, mode)
        if valid & FATTR_SIZE:
            await self._truncate(request, size, by_path=not valid & FATTR_FH)
        if valid & FATTR_MODE:
            self._tree.chmod(inode, mode)
        inode.chown(uid if valid & FATTR_UID else None, gid if valid & FATTR_GID else None)
        if valid & _TIMES:
            inode.set_times(
                atime * 1_000_000_000 + atime_ns if valid & FATTR_ATIME else None,
                mtime * 1_000_000_000 + mtime_ns if valid & FATTR_MTIME else None,
            )
        if not valid & FATTR_SIZE:  # the truncation has set the times
            inode.changed()
        if valid & ~(FATTR_SIZE | FATTR_FH | FATTR_LOCKOWNER):
            self._tree.changed(inode)
        return pack_attr(inode.stat())

    async def _truncate(self, request: Request, size: int, *, by_path: bool) -> None:
        inode = self._tree.regular(request.nodeid)
        new_size = _in_range(size)
        if inode.file.owner is not None and log.isEnabledFor(logging.INFO):
            log.info("truncate", extra=fields(ino=inode.ino, size=size, pid=request.pid, uid=request.uid))
        with self._tree.holding(inode), working_for_caller(request):
            await inode.file.truncate(new_size, by_path=by_path)

    async def statfs(self, request: Request) -> bytes:
        """Answer statfs(2): what is being freed counts as free (store/reaper.py)."""
        being_freed = self._backing.reaper.pages  # first: what a thread frees between both counts twice, and not never
        total, free_inodes = self._backing.total_pages, self._tree.space.free_inodes
        available = min(being_freed + self._backing.free_pages, total)
        free = min(being_freed + max(0, total - self._backing.used_pages), total)  # what is kept for guests among it
        return STATFS_OUT.pack(
            *(total, max(free, available), available, self._tree.space.nr_inodes, free_inodes),
            *(PAGE_SIZE, NAME_MAX, PAGE_SIZE),
        )

    # -- opening and closing ----------------------------------------------------------------------------------------

    async def open(self, request: Request) -> bytes:
        """Answer open(2) of a regular file that exists."""
        flags, open_flags = unpack(OPEN_IN, request.body)
        inode = self._tree.regular(request.nodeid)
        inode_flags.check_open(inode, flags)
        if open_flags & FUSE_OPEN_KILL_SUIDGID:
            self._kill_suidgid(inode, request)
        with self._tree.holding(inode):  # it may be unlinked meanwhile
            if flags & os.O_TRUNC:
                with working_for_caller(request):
                    await inode.file.truncate(0)
            if flags & (os.O_TRUNC | os.O_ACCMODE):
                await self.space()
            return self.opened(inode, flags, request)

    async def space(self) -> None:
        """Wait for deferred frees if they will return more space than is free now (store/reaper.py).

        Every open(2) for writing does.
        """
        reaper = self._backing.reaper
        if not reaper.is_idle and reaper.pages > self._backing.free_pages:
            await reaper.drain()

    def opened(self, inode: RegularFile, flags: int, request: Request, *, is_held: bool = False) -> bytes:
        """Open a file for a caller and return struct fuse_open_out. `is_held` as for `OpenFiles.open_file`."""
        fh, handle = self._open_files.open_file(inode, flags, Callers.here().user(request), is_held=is_held)
        if handle.access is Access.PASSTHROUGH:
            backing_id = inode.file.opens.backing_id
            assert backing_id is not None
            return OPEN_OUT.pack(fh, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, backing_id)
        if handle.access is Access.DIRECT:
            return OPEN_OUT.pack(fh, FOPEN_DIRECT_IO | FOPEN_NOFLUSH, 0)
        # What the page cache holds is true unless an owner may have written behind its back.
        return OPEN_OUT.pack(fh, 0 if inode.file.take_stale() else FOPEN_KEEP_CACHE, 0)

    async def release(self, request: Request) -> bytes:
        """Answer the close(2) of the last descriptor of a handle, after the munmap(2) of its last mapping."""
        fh, *_ = unpack(RELEASE_IN, request.body)
        inode = self._open_files.release(fh)
        if isinstance(inode, RegularFile) and not inode.file.opens.mappable and self.page_cache.forget(inode):
            inode.file.has_stale_cache()
        return b""

    def _kill_suidgid(self, inode: Inode, request: Request) -> None:
        """Drop what a change by the caller must drop: setuid and setgid bits, capabilities."""
        self._tree.kill_suidgid(inode, in_group=is_in_group_or_capable(request, inode.gid))

    # -- content ----------------------------------------------------------------------------------------------------

    async def read(self, request: Request) -> bytes:
        """Answer read(2) of a file that is not in passthrough mode."""
        fh, offset, size, *_ = unpack(READ_IN, request.body)
        if size > MAX_WRITE:
            raise Malformed(f"{size} bytes to read")
        handle = self._open_files.file(fh)
        content = handle.inode.file.read(_in_range(offset), size)
        if handle.access is Access.CACHED:
            self.page_cache.has_read(handle.inode, ByteOffset(offset), len(content), handle.user)
        return content

    async def write(self, request: Request) -> bytes:
        """Answer write(2) to a file that is not in passthrough mode, or the page cache that writes back a mapping.

        The page cache takes a short write for a whole one: fsync(2), msync(2) and close(2) report nothing but an error.
        """
        body = request.body
        fh, offset, size, write_flags, *_ = unpack(WRITE_IN, body)
        data = body[WRITE_IN.size :]
        if len(data) != size:
            raise Malformed(f"{len(data)} bytes to write instead of {size}")
        inode = self._open_files.file(fh).inode
        if write_flags & FUSE_WRITE_KILL_SUIDGID:
            self._kill_suidgid(inode, request)
        written = inode.file.write(_in_range(offset), data)
        self.page_cache.has_written(inode, ByteOffset(offset), written)
        if written < size and write_flags & FUSE_WRITE_CACHE:
            raise OSError(errno.ENOSPC, f"{size - written} bytes of a mapping find no space")
        return WRITE_OUT.pack(written, 0)

    async def lseek(self, request: Request) -> bytes:
        """Answer lseek(2) with SEEK_DATA or SEEK_HOLE; the kernel answers the others itself."""
        fh, offset, whence, _ = unpack(LSEEK_IN, request.body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, f"whence {whence}")
        signed = offset - (1 << 64) if offset >> 63 else offset
        inode = self._open_files.file(fh).inode
        file = inode.file

        async def seek(offset: ByteOffset, whence: int) -> ByteOffset:
            seek = functools.partial(file.seek, offset, whence)
            if file.size - max(0, offset) > LONG:  # the kernel may look at every page
                with working_for_caller(request):
                    return await Threads.here().run(seek)
            return seek()

        return LSEEK_OUT.pack(await self.page_cache.seek(inode, ByteOffset(signed), whence, seek))

    # -- pages ------------------------------------------------------------------------------------------------------

    async def fallocate(self, request: Request) -> bytes:
        """Answer fallocate(2): allocate a range, or free one."""
        fh, offset, length, mode, _ = unpack(FALLOCATE_IN, request.body)
        if mode not in (0, FALLOC_FL_KEEP_SIZE, PUNCH_HOLE):
            raise OSError(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}")
        if not length or offset + length > MAX_OFFSET:
            kind = errno.EFBIG if length and offset <= MAX_OFFSET else errno.EINVAL
            raise OSError(kind, f"{length} bytes from {offset} on")
        inode = self._open_files.file(fh).inode
        if inode.flags:
            inode_flags.check_fallocate(inode, mode)
        if log.isEnabledFor(logging.INFO):
            said = fields(ino=inode.ino, mode=mode, offset=offset, length=length, pid=request.pid, uid=request.uid)
            log.info("fallocate", extra=said)
        if inode.file.fallocate_now(mode, ByteOffset(offset), length):
            return b""
        with working_for_caller(request) if length > SHORT else _NEEDS_NO_THREAD:
            if mode == PUNCH_HOLE:
                await inode.file.punch(ByteOffset(offset), length)
            else:
                await inode.file.allocate(ByteOffset(offset), length, keep_size=bool(mode))
        return b""


def _in_range(offset: int) -> ByteOffset:
    """Return a place in a file. Raises OSError(EINVAL) if no file is so long."""
    if offset > MAX_OFFSET:
        raise OSError(errno.EINVAL, f"{offset} is beyond any file")
    return ByteOffset(offset)
