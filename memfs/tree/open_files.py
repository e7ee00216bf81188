"""Open files and directories: what the kernel's file handles (fh) stand for, and how the content of each is reached.

A handle of a regular file reaches content in one of three ways, and the kernel does not let an inode be open in two of
them that contradict each other:

- PASSTHROUGH: the kernel asks the backing file itself. All ordinary handles, where it can be had, O_DIRECT or not.
- CACHED: reads and writes come to us through the kernel's page cache, but for those of O_DIRECT. All ordinary handles,
  where it cannot.
- DIRECT: every read and write comes to us. Guest-sealed files always; files sealed against writes and opened for
  writing; and control handles, unless they have to share an inode with others in passthrough mode.

A control handle is one that was opened with access mode 3 (open(2): for ioctl only, with the permissions for both
reading and writing; an open(2) that creates the file says 2 instead). The kernel lets nobody read, write or map through
it, so that one can seal a file by it. Rejected: O_DIRECT as the mark of those; programs that want to bypass the page
cache want speed and mappings.

A handle of a shared file can be given a **key**, by which a call on another file names it (contract/conversion.py says
why). Whoever has the key of a handle is taken to have the handle, so a key is drawn by lot, and ends with the handle.

The first two ways can be mapped. The kernel tells a FUSE server of open and release, and release comes only after the
last munmap, but it says nothing of mmap itself, so each such handle counts as a mapping (`File.opens`).
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import secrets
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType, Protocol

from memfs.contract.conversion import Key
from memfs.state.journal import NO_JOURNAL, Committed, Journal, number_in, numbered
from memfs.store import seals
from memfs.store.file import File
from memfs.tree.holdings import Holdings
from memfs.tree.inode import Directory, RegularFile
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

CONTROL: Final = os.O_ACCMODE  #: the access mode of a handle for ioctl(2) only

HANDLE: Final = b"h"  #: the kind of keys of handles: inode, flags, way, backing id (0: none), user; key
_HANDLE: Final = struct.Struct("=QIBII")
_KEY: Final = struct.Struct("=Q")

Fh = NewType("Fh", int)


class BackingIds(Protocol):
    """The backing files that are registered with the kernel (fuse/passthrough.py)."""

    def open(self, fd: int) -> int | None:
        """Register a backing file and return its backing id, or None if there can be none."""

    def close(self, number: int) -> None:
        """Unregister a backing id that is not used any more."""


class Access(enum.Enum):
    """How a handle reaches content."""

    PASSTHROUGH = 1
    CACHED = 2
    DIRECT = 3


class OpenFile(NamedTuple):
    """An open regular file."""

    inode: RegularFile
    flags: int  #: O_* as given to open(2)
    access: Access
    user: int = 0  #: whoever opened it

    @property
    def mappable(self) -> bool:
        """Whether the file can be mapped through it."""
        return self.access is not Access.DIRECT

    @property
    def writable(self) -> bool:
        """Whether it can be written to."""
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    @property
    def may_seal(self) -> bool:
        """Whether it was opened with the permission to write."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass(frozen=True, slots=True)
class OpenDirectory:
    """An open directory. Where its reader is, the cookie says that comes with each request."""

    inode: Directory
    flags: int  #: O_* as given to open(2)


class OpenFiles:
    """All open handles of a mount. Raises OSError(EBADF) for a number that is none."""

    def __init__(
        self,
        tree: Tree,
        backing_ids: BackingIds | None = None,
        holdings: Holdings | None = None,
        journal: Journal = NO_JOURNAL,
    ) -> None:
        self._tree: Final = tree
        self._holdings: Final = holdings or Holdings.of_process()
        self._backing_ids: Final = backing_ids
        self._journal: Final = journal
        self._journal.keeps(HANDLE, self._value)
        self._next = Fh(1)
        self._open: dict[Fh, OpenFile | OpenDirectory] = {}
        self._keys: dict[Fh, Key] = {}
        self._by_key: dict[Key, Fh] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open_file(self, inode: RegularFile, flags: int, user: int = 0, *, is_held: bool = False) -> tuple[Fh, OpenFile]:
        """Open a handle as open(2) does with these flags, for a user. If the inode `is_held`, that hold is used up.

        Raises OSError: EMFILE if that user has its share (holdings.py) or there is no descriptor, and EBUSY as
        `_sealed_access` says. Inode flags are checked by the caller: a file that is being created may be opened in any
        way.
        """
        if not is_held:
            self._tree.hold(inode)
        try:
            self._holdings.hold(user, inode.ino, maps=_may_be_guest(inode.file, flags))
            try:
                handle = OpenFile(inode, flags, self._access(inode, flags), user)
            except OSError:
                self._holdings.release(user, inode.ino)
                raise
        except OSError:
            self._tree.release(inode)
            raise
        if handle.mappable:
            inode.file.opens.add(writable=handle.writable)
        return self._add(handle), handle

    def _access(self, inode: RegularFile, flags: int) -> Access:
        file, controls = inode.file, flags & os.O_ACCMODE == CONTROL
        if file.guest:
            return Access.DIRECT
        if file.seals & seals.ON_WRITES and not controls:
            return self._sealed_access(file, flags)
        if not controls and not file.opens.mappable and self._backing_ids is not None:
            file.opens.pass_through(self._backing_ids.open(file.fd))
        if file.opens.backing_id is not None:
            return Access.PASSTHROUGH
        return Access.DIRECT if controls else Access.CACHED

    def _sealed_access(self, file: File, flags: int) -> Access:
        """Return how to open a file sealed on writes: all writes must come to us. EBUSY while readers pass through."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if file.opens.backing_id is not None:
            if writes:
                raise OSError(errno.EBUSY, "sealed, and still open from before in a way that excludes this one")
            return Access.PASSTHROUGH
        # A writable mapping of the page cache would look as if it had been written.
        return Access.DIRECT if writes and file.seals & seals.NO_WRITES else Access.CACHED

    def open_directory(self, inode: Directory, flags: int) -> Fh:
        """Open a handle as opendir(3) does."""
        self._tree.hold(inode)
        return self._add(OpenDirectory(inode, flags))

    def file(self, fh: int) -> OpenFile:
        """Return the open file behind a number."""
        handle = self._open.get(Fh(fh))
        if not isinstance(handle, OpenFile):
            raise OSError(errno.EBADF, f"no open file {fh}")
        return handle

    def key(self, fh: int) -> Key:
        """Return the key of an open file. Raises OSError(EBADF) also if it is not open for writing."""
        if not self.file(fh).writable:
            raise OSError(errno.EBADF, "not open for writing")
        if Fh(fh) not in self._keys:
            key = Key(secrets.randbits(64))
            self._keys[Fh(fh)], self._by_key[key] = key, Fh(fh)
            self._journal.changed(HANDLE, fh)
        return self._keys[Fh(fh)]

    def by_key(self, key: Key) -> OpenFile:
        """Return the open file that has a key."""
        fh = self._by_key.get(key)
        if fh is None:
            raise OSError(errno.EBADF, "the key of no open file")
        return self.file(fh)

    def directory(self, fh: int) -> OpenDirectory:
        """Return the open directory behind a number."""
        handle = self._open.get(Fh(fh))
        if not isinstance(handle, OpenDirectory):
            raise OSError(errno.EBADF, f"no open directory {fh}")
        return handle

    def release(self, fh: int) -> RegularFile | Directory:
        """Close a handle whose last descriptor and mapping are gone, and return its inode."""
        handle = self._open.pop(Fh(fh), None)
        if handle is None:
            raise OSError(errno.EBADF, f"no open handle {fh}")
        inode = handle.inode
        self._journal.changed(HANDLE, fh)
        if self._keys and (key := self._keys.pop(Fh(fh), None)) is not None:
            del self._by_key[key]
        if isinstance(handle, OpenFile):
            self._holdings.release(handle.user, inode.ino)
            if handle.mappable:
                unused = handle.inode.file.opens.remove(writable=handle.writable)
                if unused is not None and self._backing_ids is not None:
                    self._backing_ids.close(unused)
        self._tree.release(inode)
        return inode

    def _value(self, key: bytes) -> bytes | None:
        """Return what is written of a handle."""
        handle = self._open.get(Fh(number_in(key)))
        if handle is None:
            return None
        if isinstance(handle, OpenDirectory):
            return _HANDLE.pack(handle.inode.ino, handle.flags, 0, 0, 0)
        backing_id = handle.inode.file.opens.backing_id if handle.access is Access.PASSTHROUGH else 0
        packed = _HANDLE.pack(handle.inode.ino, handle.flags, handle.access.value, backing_id or 0, handle.user)
        file_key = self._keys.get(Fh(number_in(key)))
        return packed if file_key is None else packed + _KEY.pack(file_key)

    def restore(self, state: Committed) -> None:
        """Open the handles that were written down. One whose file cannot be opened is closed."""
        for key, value in state.items_of(HANDLE):
            fh = Fh(number_in(key))
            self._next = Fh(max(self._next, fh + 1))
            try:
                self._restore(fh, value)
            except OSError as error:
                log.error("an open file is closed: %s", error)  # noqa: TRY400
                self._journal.changed(HANDLE, fh)

    def _restore(self, fh: Fh, value: bytes) -> None:
        ino, flags, access, backing_id, user = _HANDLE.unpack_from(value)
        inode = self._tree.inode(ino)
        self._tree.hold(inode)
        handle: OpenFile | OpenDirectory
        if isinstance(inode, RegularFile):
            handle = OpenFile(inode, flags, Access(access), user)
            self._holdings.take(user, ino, maps=_may_be_guest(inode.file, flags))
            if handle.mappable:
                if not inode.file.opens.mappable and backing_id:
                    inode.file.opens.pass_through(backing_id)
                inode.file.opens.add(writable=handle.writable)
        else:
            handle = OpenDirectory(self._tree.directory(ino), flags)
        self._open[fh] = handle
        if len(value) > _HANDLE.size:
            (number,) = _KEY.unpack_from(value, _HANDLE.size)
            self._keys[fh], self._by_key[Key(number)] = Key(number), fh

    @property
    def backing_ids(self) -> set[int]:
        """The backing ids of handles in passthrough mode."""
        files = (handle.inode.file for handle in self._open.values() if isinstance(handle, OpenFile))
        return {file.opens.backing_id for file in files if file.opens.backing_id is not None}

    @property
    def cached(self) -> set[RegularFile]:
        """The files that are open for writing through the kernel's page cache."""
        handles = (handle for handle in self._open.values() if isinstance(handle, OpenFile))
        return {handle.inode for handle in handles if handle.access is Access.CACHED and handle.writable}

    @property
    def keys(self) -> set[bytes]:
        """The keys of all handles."""
        return {numbered(HANDLE, fh) for fh in self._open}

    def close(self) -> None:
        """Close all handles; the mount has ended."""
        for fh in list(self._open):
            self.release(fh)

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        held: dict[int, list[OpenFile | OpenDirectory]] = {}
        for handle in self._open.values():
            held.setdefault(handle.inode.ino, []).append(handle)
        for inode in self._tree.files():
            files = [handle for handle in held.get(inode.ino, ()) if isinstance(handle, OpenFile)]
            mappable = [handle for handle in files if handle.mappable]
            assert inode.file.opens.mappable == len(mappable), f"inode {inode.ino}: mappable opens"
            assert inode.file.opens.writable == sum(handle.writable for handle in mappable), f"inode {inode.ino}"
            accesses = {handle.access for handle in mappable}
            assert len(accesses) <= 1, f"inode {inode.ino} is open in contradicting ways"
            passes = inode.file.opens.backing_id is not None
            assert passes == (Access.PASSTHROUGH in accesses), f"inode {inode.ino}: backing id"
        assert {fh: key for key, fh in self._by_key.items()} == self._keys, "keys do not match"
        assert self._keys.keys() <= self._open.keys(), "a key of a handle that is closed"
        for ino, handles in held.items():
            assert self._tree.inode(ino).holds >= len(handles), f"inode {ino}: fewer holds than handles"

    def _add(self, handle: OpenFile | OpenDirectory) -> Fh:
        """Give a handle a number; its inode is held."""
        fh = self._next
        self._next = Fh(fh + 1)
        self._open[fh] = handle
        self._journal.changed(HANDLE, fh)
        return fh


def _may_be_guest(file: File, flags: int) -> bool:
    """Return whether a file is tracked, or may become so while a handle with these flags is open."""
    return file.is_tracked or bool(file.seals & seals.ON_WRITES) or flags & os.O_ACCMODE == CONTROL
