"""Answers to requests by name: looking up, creating and removing regular files, and reading directories.

Requests by name that programs make less often are left to pyfuse3 (operations.py). It could answer most of these, too,
but each of its answers costs two more event-loop iterations, one for libfuse to see the request behind the socketpair
and one for the channel to see the reply, and that was half of what a create, stat and unlink took. And the contents of
a directory can be too long for the socketpair.
"""

from __future__ import annotations

import os
import stat
from itertools import islice
from typing import Final

from memfs.contract.aio.turns import Turns
from memfs.fuse.abi import (
    BATCH_FORGET_IN,
    CREATE_IN,
    FORGET_IN,
    FORGET_ONE,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    Malformed,
    Request,
    unpack,
    unpack_name,
)
from memfs.fuse.files import FileHandlers
from memfs.fuse.reply import NO_ENTRY, pack_direntplus, pack_entry
from memfs.tree.access_times import AccessTimes
from memfs.tree.inode import DOT_COOKIE, DOTDOT_COOKIE, Inode, RegularFile
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import Tree
from memfs.tree.xattrs import Xattrs

_FORGOTTEN_AT_ONCE: Final = 16  # look-ups, as a unit of work: the memory of a file may be freed with each
_ENTRY_BYTES: Final = 1500  # of a reply, as a unit of work
_MOST_ENTRIES: Final = 256  # of a directory in one reply, each of which may take a stat(2)


class NameHandlers:
    """The channel's handlers for names and directories. Each raises OSError with the errno to answer.

    `access_times` says whether reading a directory sets its access time.
    """

    def __init__(
        self, tree: Tree, open_files: OpenFiles, files: FileHandlers, xattrs: Xattrs, access_times: AccessTimes
    ) -> None:
        self._tree: Final = tree
        self._open_files: Final = open_files
        self._files: Final = files
        self._xattrs: Final = xattrs
        self._access_times: Final = access_times

    # -- finding ----------------------------------------------------------------------------------------------------

    async def lookup(self, request: Request) -> bytes:
        """Answer a look-up of a name in a directory; that there is no such name may be cached, too."""
        try:
            inode = self._tree.lookup(request.nodeid, unpack_name(request.body))
        except FileNotFoundError:
            return NO_ENTRY
        return self._entry(inode)

    def _entry(self, inode: Inode) -> bytes:
        """Return struct fuse_entry_out, which the kernel counts as a look-up of the inode."""
        self._tree.looked_up(inode)
        return pack_entry(inode.stat())

    async def forget(self, request: Request) -> None:
        """Forget look-ups of an inode."""
        (nlookup,) = unpack(FORGET_IN, request.body)
        self._tree.forget(request.nodeid, nlookup)

    async def batch_forget(self, request: Request) -> None:
        """Forget look-ups of many inodes."""
        body = request.body
        count, _ = unpack(BATCH_FORGET_IN, body)
        forgotten = bytes(body[BATCH_FORGET_IN.size :])
        if len(forgotten) != count * FORGET_ONE.size:
            raise Malformed(f"{count} inodes to forget in {len(forgotten)} bytes")
        turns = Turns.here()
        for number, (nodeid, nlookup) in enumerate(FORGET_ONE.iter_unpack(forgotten)):
            if number % _FORGOTTEN_AT_ONCE == 0:
                await turns.take(self)
            self._tree.forget(nodeid, nlookup)

    # -- creating and removing --------------------------------------------------------------------------------------

    async def create(self, request: Request) -> bytes:
        """Answer open(2) that creates a regular file."""
        await self._files.space()
        body = request.body
        flags, mode, umask = _unpack_create(body)
        name = unpack_name(body[CREATE_IN.size :])
        seals = self._xattrs.default_seals(request.nodeid)
        inode = self._tree.create(request.nodeid, name, mode, request.uid, request.gid, umask=umask, seals=seals)
        try:
            return self._created(inode, flags)
        except OSError:  # EMFILE: all or nothing
            self._tree.unlink(request.nodeid, name)
            raise

    async def tmpfile(self, request: Request) -> bytes:
        """Answer open(2) with O_TMPFILE."""
        await self._files.space()
        flags, mode, umask = _unpack_create(request.body)
        seals = self._xattrs.default_seals(request.nodeid)
        inode = self._tree.create_unlinked(request.nodeid, mode, request.uid, request.gid, umask=umask, seals=seals)
        return self._created(inode, flags)

    def _created(self, inode: Inode, flags: int) -> bytes:
        assert isinstance(inode, RegularFile)
        opened = self._files.opened(inode, flags)
        return self._entry(inode) + opened

    async def unlink(self, request: Request) -> bytes:
        """Answer unlink(2)."""
        self._tree.unlink(request.nodeid, unpack_name(request.body))
        return b""

    # -- directories ------------------------------------------------------------------------------------------------

    async def opendir(self, request: Request) -> bytes:
        """Answer opendir(3)."""
        flags, _ = unpack(OPEN_IN, request.body)
        fh = self._open_files.open_directory(self._tree.directory(request.nodeid), flags)
        return OPEN_OUT.pack(fh, 0, 0)

    async def readdirplus(self, request: Request) -> bytes:
        """Answer getdents(2) with entries after a cookie, as many as fit. Each but . and .. counts as a look-up."""
        fh, cookie, size, *_ = unpack(READ_IN, request.body)
        handle = self._open_files.directory(fh)
        directory = handle.inode
        if not handle.flags & os.O_NOATIME:
            self._access_times.read(directory)
        packed = bytearray()
        for own_cookie, name, inode in ((DOT_COOKIE, b".", directory), (DOTDOT_COOKIE, b"..", directory.parent)):
            if cookie < own_cookie:
                packed += pack_direntplus(name, inode.stat(), own_cookie)
        for entry in islice(directory.entries_after(cookie), _MOST_ENTRIES):
            direntplus = pack_direntplus(entry.name, entry.inode.stat(), entry.cookie)
            if len(packed) + len(direntplus) > size:
                break
            packed += direntplus
            self._tree.looked_up(entry.inode)
        Turns.here().spend(self, len(packed) // _ENTRY_BYTES)
        return bytes(packed)


def _unpack_create(body: memoryview) -> tuple[int, int, int]:
    """Return flags, mode and umask.

    open(2) creates a regular file, whatever type the mode says, and a umask has nine bits.
    """
    flags, mode, umask, _ = unpack(CREATE_IN, body)
    return flags, stat.S_IMODE(mode) | stat.S_IFREG, umask & 0o777
