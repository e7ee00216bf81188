"""Answers to the requests that programs make most: finding, making, opening, asking about and removing files.

pyfuse3 could answer these, and did, until it was measured: each of its answers costs two more turns of the event loop,
one for libfuse to see the request behind the socketpair and one for the channel to see the reply, and that was half of
what a create, stat and unlink took. So these are answered where they arrive; and extended attributes, because the
kernel asks for security.capability before it changes content. What is asked for less often stays in operations.py; no
request is answered in both.

What the kernel may cache follows from who can change what. Names and attributes change only through this mount, so the
kernel, which has seen every request, may believe them for good, absent names included. Not so the block count of a file
with content: an owner, or a program that writes to a mapping, changes it and nobody tells. Such a file's attributes are
asked for each time.

Where there is no cache there is nothing to flush, and close(2) need not ask (FOPEN_NOFLUSH): a daemon killed while it
had a descriptor of its own mount would otherwise wait, in exit(2), for an answer of its own.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Callable, Coroutine
from typing import Any, Final

from memfs.fuse.abi import (
    BATCH_FORGET_IN,
    CREATE_IN,
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FOPEN_NOFLUSH,
    FOPEN_PASSTHROUGH,
    FORGET_IN,
    FORGET_ONE,
    FUSE_OPEN_KILL_SUIDGID,
    GETXATTR_IN,
    GETXATTR_OUT,
    NO_ENTRY,
    OPEN_IN,
    OPEN_OUT,
    RELEASE_IN,
    Malformed,
    Opcode,
    Request,
    pack_attr,
    pack_entry,
    pack_statx,
    reply,
    unpack,
)
from memfs.fuse.caller import in_group_or_capable
from memfs.fuse.channel import Handler
from memfs.store.backing import Backing
from memfs.tree import inode_flags
from memfs.tree.inode import RegularFile
from memfs.tree.open_files import Access, OpenFiles
from memfs.tree.tree import Tree
from memfs.tree.xattrs import Xattrs


class Names:
    """The channel's handlers for names and handles. They raise OSError; the channel makes replies of that."""

    def __init__(self, tree: Tree, handles: OpenFiles, attributes: Xattrs, backing: Backing) -> None:
        self._tree: Final = tree
        self._handles: Final = handles
        self._attributes: Final = attributes
        self._backing: Final = backing
        self.handlers: Final[dict[int, Handler]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.STATX: self._statx,
            Opcode.GETXATTR: self._getxattr,
            Opcode.UNLINK: self._unlink,
            Opcode.CREATE: lambda request: self._with_room(request, self._create),
            Opcode.TMPFILE: lambda request: self._with_room(request, self._tmpfile),
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASEDIR: self._release,
        }

    def _lookup(self, request: Request) -> bytes:
        try:
            inode = self._tree.lookup(request.nodeid, _name(request.body))
        except FileNotFoundError:
            return reply(request.unique, NO_ENTRY)
        inode.nlookup += 1
        return reply(request.unique, pack_entry(inode.stat()))

    def _forget(self, request: Request) -> None:
        (nlookup,) = unpack(FORGET_IN, request.body)
        self._tree.forget(request.nodeid, nlookup)

    def _batch_forget(self, request: Request) -> None:
        count, _ = unpack(BATCH_FORGET_IN, request.body)
        forgotten = request.body[BATCH_FORGET_IN.size :]
        if len(forgotten) != count * FORGET_ONE.size:
            raise Malformed(f"{count} inodes to forget in {len(forgotten)} bytes")
        for nodeid, nlookup in FORGET_ONE.iter_unpack(forgotten):
            self._tree.forget(nodeid, nlookup)

    def _getattr(self, request: Request) -> bytes:
        return reply(request.unique, pack_attr(self._tree.inode(request.nodeid).stat()))

    def _statx(self, request: Request) -> bytes:
        return reply(request.unique, pack_statx(self._tree.inode(request.nodeid).stat()))

    def _getxattr(self, request: Request) -> bytes:
        size, _ = unpack(GETXATTR_IN, request.body)
        value = self._attributes.get(request.nodeid, _name(request.body[GETXATTR_IN.size :]))
        if not size:
            return reply(request.unique, GETXATTR_OUT.pack(len(value), 0))
        if len(value) > size:
            raise OSError(errno.ERANGE, "the attribute is larger")
        return reply(request.unique, value)

    def _unlink(self, request: Request) -> bytes:
        self._tree.unlink(request.nodeid, _name(request.body))
        return reply(request.unique)

    def _create(self, request: Request) -> bytes:
        flags, mode, umask = _unpack_create(request.body)
        name = _name(request.body[CREATE_IN.size :])
        inode = self._tree.create(
            request.nodeid,
            name,
            mode,
            request.uid,
            request.gid,
            umask=umask,
            seals=self._attributes.default_seals(request.nodeid),
        )
        try:
            return self._created(request, inode, flags)
        except OSError:  # EMFILE: all or nothing
            self._tree.unlink(request.nodeid, name)
            raise

    def _tmpfile(self, request: Request) -> bytes:
        flags, mode, umask = _unpack_create(request.body)
        seals = self._attributes.default_seals(request.nodeid)
        inode = self._tree.create_unlinked(request.nodeid, mode, request.uid, request.gid, umask=umask, seals=seals)
        return self._created(request, inode, flags)

    def _created(self, request: Request, inode: object, flags: int) -> bytes:
        assert isinstance(inode, RegularFile)
        opened = self._opened(inode, flags)
        inode.nlookup += 1
        return reply(request.unique, pack_entry(inode.stat()) + opened)

    def _open(self, request: Request) -> bytes | Coroutine[Any, Any, bytes]:
        flags, open_flags = unpack(OPEN_IN, request.body)
        inode = self._tree.regular(request.nodeid)
        inode_flags.check_open(inode, flags)
        if open_flags & FUSE_OPEN_KILL_SUIDGID:
            inode.kill_suidgid(in_group=in_group_or_capable(request, inode.gid))
        if flags & os.O_TRUNC:
            return self._truncate_and_open(request.unique, inode, flags)
        if flags & os.O_ACCMODE != os.O_RDONLY and self._is_room_coming():
            return self._wait_and_open(request.unique, inode, flags)
        return reply(request.unique, self._opened(inode, flags))

    def _is_room_coming(self) -> bool:
        """Whether more is being freed than there is: then who opens a file to write to waits for that (reaper.py)."""
        reaper = self._backing.reaper
        return not reaper.is_idle and reaper.pages > self._backing.free_pages

    def _with_room(self, request: Request, make: Callable[[Request], bytes]) -> bytes | Coroutine[Any, Any, bytes]:
        """Make and open a file, if room is coming when it is there."""
        if not self._is_room_coming():
            return make(request)
        kept = dataclasses.replace(request, body=memoryview(bytes(request.body)))

        async def make_later() -> bytes:
            await self._backing.reaper.drain()
            return make(kept)

        return make_later()

    async def _wait_and_open(self, unique: int, inode: RegularFile, flags: int) -> bytes:
        with self._tree.holding(inode):  # it may be unlinked meanwhile
            await self._backing.reaper.drain()
            return reply(unique, self._opened(inode, flags))

    async def _truncate_and_open(self, unique: int, inode: RegularFile, flags: int) -> bytes:
        with self._tree.holding(inode):
            await inode.file.truncate(0)
            if self._is_room_coming():
                await self._backing.reaper.drain()
            return reply(unique, self._opened(inode, flags))

    def _opened(self, inode: RegularFile, flags: int) -> bytes:
        fh, handle = self._handles.open_file(inode, flags)
        if handle.access is Access.PASSTHROUGH:
            backing_id = inode.file.opens.backing_id
            assert backing_id is not None
            return OPEN_OUT.pack(fh, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, backing_id)
        if handle.access is Access.DIRECT:
            return OPEN_OUT.pack(fh, FOPEN_DIRECT_IO | FOPEN_NOFLUSH, 0)
        # What the page cache holds is true unless an owner may have written behind its back.
        return OPEN_OUT.pack(fh, 0 if inode.file.take_stale() else FOPEN_KEEP_CACHE, 0)

    def _opendir(self, request: Request) -> bytes:
        flags, _ = unpack(OPEN_IN, request.body)
        fh = self._handles.open_directory(self._tree.directory(request.nodeid), flags)
        return reply(request.unique, OPEN_OUT.pack(fh, 0, 0))

    def _release(self, request: Request) -> bytes:
        fh, *_ = unpack(RELEASE_IN, request.body)
        self._handles.release(fh)
        return reply(request.unique)


def _unpack_create(body: memoryview) -> tuple[int, int, int]:
    """Flags, mode and umask. What open(2) makes is a regular file, whatever type is said, and a umask has nine bits."""
    flags, mode, umask, _ = unpack(CREATE_IN, body)
    return flags, stat.S_IMODE(mode) | stat.S_IFREG, umask & 0o777


def _name(data: memoryview) -> bytes:
    """A name in a request: it ends with a zero byte."""
    name = bytes(data)
    if not name.endswith(b"\0"):
        raise Malformed("a name without an end")
    if len(name) == 1:
        raise OSError(errno.EINVAL, "an empty name")
    return name[:-1]
