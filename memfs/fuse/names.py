"""Answers to requests by name: looking up, creating, linking, renaming and removing, and reading directories and links.

pyfuse3 could answer most of these, but each of its answers costs two more event-loop iterations, one for libfuse to see
the request behind the socketpair and one for the channel to see the reply, and that was half of what a create, stat and
unlink took. And the contents of a directory can be too long for the socketpair.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import islice
from typing import Final

from memfs.contract.aio.threads import working_for
from memfs.contract.aio.turns import Turns
from memfs.fuse.abi import (
    BATCH_FORGET_IN,
    CREATE_IN,
    FORGET_IN,
    FORGET_ONE,
    LINK_IN,
    MKDIR_IN,
    MKNOD_IN,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    RENAME2_IN,
    RENAME_IN,
    Malformed,
    Request,
    unpack,
    unpack_name,
    unpack_names,
)
from memfs.fuse.files import FileHandlers
from memfs.fuse.reply import NO_ENTRY, pack_direntplus, pack_entry
from memfs.tree.access_times import AccessTimes
from memfs.tree.inode import DOT_COOKIE, DOTDOT_COOKIE, Inode, RegularFile, Symlink
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import Tree
from memfs.tree.xattrs import Xattrs

_FORGOTTEN_AT_ONCE: Final = 16  # look-ups, as a unit of work, beside the memory that is freed with them
_ENTRY_BYTES: Final = 1500  # of a reply, as a unit of work
_MOST_ENTRIES: Final = 256  # of a directory in one reply, each of which may take a stat(2)
_UMASK: Final = 0o777  # the bits that there are


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
        with working_for(lambda: self):
            for number, (nodeid, nlookup) in enumerate(FORGET_ONE.iter_unpack(forgotten)):
                if number % _FORGOTTEN_AT_ONCE == 0 or not turns.has_share(self):
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
        new = self._tree.create(
            request.nodeid, name, mode, request.uid, request.gid, umask=umask, seals=seals, held=True
        )
        try:
            return self._created(new, flags, request)
        except OSError:  # EMFILE: all or nothing
            self._tree.unlink(request.nodeid, name)
            raise

    async def tmpfile(self, request: Request) -> bytes:
        """Answer open(2) with O_TMPFILE."""
        await self._files.space()
        flags, mode, umask = _unpack_create(request.body)
        seals = self._xattrs.default_seals(request.nodeid)
        new = self._tree.create_unlinked(request.nodeid, mode, request.uid, request.gid, umask=umask, seals=seals)
        return self._created(new, flags, request)

    def _created(self, inode: Inode, flags: int, request: Request) -> bytes:
        assert isinstance(inode, RegularFile)
        opened = self._files.opened(inode, flags, request, is_held=True)
        return self._entry(inode) + opened

    async def mknod(self, request: Request) -> bytes:
        """Answer mknod(2)."""
        body = request.body
        mode, rdev, umask, _ = unpack(MKNOD_IN, body)
        return self._made(request, unpack_name(body[MKNOD_IN.size :]), mode, umask, rdev)

    async def mkdir(self, request: Request) -> bytes:
        """Answer mkdir(2)."""
        body = request.body
        mode, umask = unpack(MKDIR_IN, body)
        return self._made(request, unpack_name(body[MKDIR_IN.size :]), stat.S_IMODE(mode) | stat.S_IFDIR, umask)

    def _made(self, request: Request, name: bytes, mode: int, umask: int, rdev: int = 0) -> bytes:
        parent, umask = request.nodeid, umask & _UMASK
        seals = self._xattrs.default_seals(parent) if stat.S_ISREG(mode) else 0
        made = self._tree.create(parent, name, mode, request.uid, request.gid, umask=umask, rdev=rdev, seals=seals)
        return self._entry(made)

    async def symlink(self, request: Request) -> bytes:
        """Answer symlink(2)."""
        name, target = unpack_names(request.body)
        return self._entry(self._tree.symlink(request.nodeid, name, target, request.uid, request.gid))

    async def link(self, request: Request) -> bytes:
        """Answer link(2)."""
        body = request.body
        (nodeid,) = unpack(LINK_IN, body)
        return self._entry(self._tree.link(nodeid, request.nodeid, unpack_name(body[LINK_IN.size :])))

    async def unlink(self, request: Request) -> bytes:
        """Answer unlink(2)."""
        self._tree.unlink(request.nodeid, unpack_name(request.body))
        return b""

    async def rmdir(self, request: Request) -> bytes:
        """Answer rmdir(2)."""
        self._tree.rmdir(request.nodeid, unpack_name(request.body))
        return b""

    async def rename(self, request: Request) -> bytes:
        """Answer rename(2)."""
        (directory,) = unpack(RENAME_IN, request.body)
        return self._renamed(request, request.body[RENAME_IN.size :], directory, 0)

    async def rename2(self, request: Request) -> bytes:
        """Answer renameat2(2) with flags."""
        directory, flags, _ = unpack(RENAME2_IN, request.body)
        return self._renamed(request, request.body[RENAME2_IN.size :], directory, flags)

    def _renamed(self, request: Request, names: memoryview, directory: int, flags: int) -> bytes:
        name, new_name = unpack_names(names)
        self._tree.rename(request.nodeid, name, directory, new_name, flags, uid=request.uid, gid=request.gid)
        return b""

    # -- symbolic links ---------------------------------------------------------------------------------------------

    async def readlink(self, request: Request) -> bytes:
        """Answer readlink(2)."""
        inode = self._tree.inode(request.nodeid)
        if not isinstance(inode, Symlink):
            raise OSError(errno.EINVAL, "not a symbolic link")
        if self._access_times.read(inode):
            self._tree.changed(inode)
        return inode.target

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
        if not handle.flags & os.O_NOATIME and self._access_times.read(directory):
            self._tree.changed(directory)
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
    """Return flags, mode and umask. open(2) creates a regular file, whatever type the mode says."""
    flags, mode, umask, _ = unpack(CREATE_IN, body)
    return flags, stat.S_IMODE(mode) | stat.S_IFREG, umask & _UMASK
