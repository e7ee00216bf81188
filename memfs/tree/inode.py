"""The kinds of inode: what each has, and what stat(2) tells of it.

Times are in nanoseconds since the epoch. A directory's entries carry a cookie that only grows; a reader begins with the
newest and goes on below the last cookie it saw, so that an entry is neither shown twice nor lost while others come and
go.

There may be very many inodes, and what each costs is the daemon's own memory. So those that have no use for a time have
no slot for it, and numbers that are the same in most of them (`_shared`) are one object.
"""

from __future__ import annotations

import functools
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, NewType

from memfs.contract.units import PAGE_SIZE
from memfs.store.file import File
from memfs.tree import acl
from memfs.tree.cookie_order import CookieOrder

Ino = NewType("Ino", int)

FOREVER: Final = 3600  #: seconds that the kernel may believe what only it can change
DOT_COOKIE: Final = 1
DOTDOT_COOKIE: Final = 2
_DIRENT_BYTES: Final = 20  # BOGO_DIRENT_SIZE: what tmpfs counts for an entry in a directory's st_size
_CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h
_DAY: Final = 24 * 3600 * 1_000_000_000  # nanoseconds
CAPABILITY: Final = b"security.capability"


def _now() -> int:
    """Return the time by the clock that the kernel stamps files with, so that its stamps and ours are in order."""
    return _shared(time.clock_gettime_ns(_CLOCK_REALTIME_COARSE))


@functools.lru_cache(1024)
def _shared(number: int) -> int:
    """Return the same number, and the same object if it was asked for lately."""
    return number


class Stat(NamedTuple):
    """What stat(2) tells of an inode. Sizes in bytes, blocks of 512 bytes, times in nanoseconds since the epoch."""

    ino: Ino
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    stable: bool  #: whether nothing but requests through the mount can change it
    blksize: int = PAGE_SIZE  #: in what blocks I/O is efficient


class Inode:
    """An inode of any kind."""

    __slots__ = ("btime_ns", "flags", "gid", "holds", "ino", "mode", "nlink", "nlookup", "uid", "xattrs")

    def __init__(self, ino: Ino, mode: int, uid: int, gid: int) -> None:
        self.ino: Final = ino
        self.mode = _shared(mode)  #: type and permission bits, as st_mode
        self.uid = _shared(uid)
        self.gid = _shared(gid)
        self.nlink = 1
        self.nlookup = 0  #: how often the kernel looked it up and has not forgotten it
        self.holds = 0  #: open handles and registrations
        self.flags = 0  #: FS_*_FL of chattr(1)
        self.btime_ns = _now()
        self.xattrs: dict[bytes, bytes] | None = None  # most have none

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    def stat(self) -> Stat:
        """Return what stat(2) tells of the inode."""
        raise NotImplementedError

    def changed(self) -> None:
        """Set POSIX's ctime: the inode itself was changed."""
        raise NotImplementedError

    def set_times(self, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set times as utimensat(2) does; None leaves one as it is."""
        raise NotImplementedError

    def chmod(self, mode: int) -> None:
        """Change the permission bits as chmod(2) does, and the access ACL with them."""
        self.mode = _shared(stat.S_IFMT(self.mode) | stat.S_IMODE(mode))
        if self.xattrs is not None and acl.ACCESS in self.xattrs:
            self.xattrs[acl.ACCESS] = acl.after_chmod(self.xattrs[acl.ACCESS], mode)

    def chown(self, uid: int | None, gid: int | None) -> None:
        """Change user and group; None leaves one as it is. chown(2) drops setuid and setgid in a call of its own."""
        self.uid = self.uid if uid is None else _shared(uid)
        self.gid = self.gid if gid is None else _shared(gid)

    def set_flags(self, flags: int) -> None:
        """Set FS_*_FL flags, and clear all others (chattr(1))."""
        self.flags = flags
        self.changed()

    def kill_suidgid(self, *, in_group: bool) -> None:
        """Drop setuid, and setgid if the group may execute or the caller is not `in_group`.

        As the VFS does (setattr_should_drop_suidgid()) when a process without CAP_FSETID changes content, or any the
        owner (FUSE_HANDLE_KILLPRIV_V2, linux/fuse.h). File capabilities go as well, with the tree.
        """
        if self.is_dir:
            return
        self.mode &= ~stat.S_ISUID
        if self.mode & stat.S_IXGRP or not in_group:
            self.mode &= ~stat.S_ISGID


class RegularFile(Inode):
    """A regular file. `file` has all but its attributes; its times are the backing file's, which passthrough sets."""

    __slots__ = ("file",)

    def __init__(self, ino: Ino, mode: int, uid: int, gid: int, file: File) -> None:
        super().__init__(ino, mode, uid, gid)
        self.file: Final = file

    def changed(self) -> None:
        """Set the backing file's ctime."""
        self.file.touch_ctime()

    def stat(self) -> Stat:
        """Return what stat(2) tells: size, blocks and times are the backing file's."""
        backing = self.file.stat()
        size, blocks = backing.st_size, backing.st_blocks
        times = (backing.st_atime_ns, backing.st_mtime_ns, backing.st_ctime_ns, self.btime_ns)
        # An owner, or a program that writes to a mapping, fills holes, and nobody is notified. What is being allocated
        # lies beyond the end until all of it is there.
        stable = not (size or blocks or self.file.is_given_out)
        own = (self.ino, self.mode, self.nlink, self.uid, self.gid)
        return Stat(*own, 0, size, blocks, *times, stable, backing.st_blksize)

    def set_times(self, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set the backing file's times; None leaves one as it is."""
        now = self.file.stat()
        self.file.set_times(
            now.st_atime_ns if atime_ns is None else atime_ns, now.st_mtime_ns if mtime_ns is None else mtime_ns
        )


class TimedInode(Inode):
    """An inode whose times are kept here."""

    __slots__ = ("atime_ns", "ctime_ns", "mtime_ns")

    def __init__(self, ino: Ino, mode: int, uid: int, gid: int) -> None:
        super().__init__(ino, mode, uid, gid)
        self.atime_ns = self.mtime_ns = self.ctime_ns = self.btime_ns

    def stat(self) -> Stat:
        """Return what stat(2) tells of an inode without content."""
        return self._stat()

    def changed(self) -> None:
        """Set POSIX's ctime: the inode itself was changed."""
        self.ctime_ns = _now()

    def modified(self) -> None:
        """Set POSIX's mtime and ctime: the content was changed."""
        self.mtime_ns = self.ctime_ns = _now()

    def accessed(self, *, always: bool = False) -> bool:
        """Set POSIX's atime, `always` or as relatime has it (mount(8)): the content was read.

        Returns whether it was set.
        """
        now = _now()
        is_due = always or self.atime_ns <= max(self.mtime_ns, self.ctime_ns) or now - self.atime_ns > _DAY
        if is_due:
            self.atime_ns = now
        return is_due

    def set_times(self, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set times; None leaves one as it is."""
        self.atime_ns = self.atime_ns if atime_ns is None else atime_ns
        self.mtime_ns = self.mtime_ns if mtime_ns is None else mtime_ns

    def _stat(self, *, size: int = 0, rdev: int = 0) -> Stat:
        times = self.atime_ns, self.mtime_ns, self.ctime_ns, self.btime_ns
        return Stat(self.ino, self.mode, self.nlink, self.uid, self.gid, rdev, size, 0, *times, True)


class Symlink(TimedInode):
    """A symbolic link. A long target takes a page of memory, as on tmpfs, and then `page` is a file that has it."""

    __slots__ = ("page", "target")

    def __init__(self, ino: Ino, mode: int, uid: int, gid: int, target: bytes, page: File | None) -> None:
        super().__init__(ino, mode, uid, gid)
        self.target: Final = target
        self.page: Final = page

    def stat(self) -> Stat:
        """Return what stat(2) tells: the size is the target's."""
        blocks = self.page.stat().st_blocks if self.page is not None else 0
        return self._stat(size=len(self.target))._replace(blocks=blocks)


class Special(TimedInode):
    """A FIFO, a socket or a device: the kernel does everything but remember it."""

    __slots__ = ("rdev",)

    def __init__(self, ino: Ino, mode: int, uid: int, gid: int, rdev: int) -> None:
        super().__init__(ino, mode, uid, gid)
        self.rdev: Final = rdev

    def stat(self) -> Stat:
        """Return what stat(2) tells, with the device number."""
        return self._stat(rdev=self.rdev)


class Entry:
    """A name in a directory."""

    __slots__ = ("_inode", "cookie", "name")

    def __init__(self, name: bytes, inode: Inode | None, cookie: int) -> None:
        self.name = name
        self.cookie = cookie
        self._inode = inode

    @property
    def inode(self) -> Inode:
        """What it names."""
        assert self._inode is not None
        return self._inode


class EntryFromBefore(Entry):
    """A name of an inode that is found by its number when it is asked for."""

    __slots__ = ("_inodes", "ino")

    def __init__(self, name: bytes, ino: Ino, cookie: int, inodes: Mapping[Ino, Inode]) -> None:
        self.name, self.cookie, self._inode = name, cookie, None  # there are very many
        self.ino: Final = ino
        self._inodes: Final = inodes

    @property
    def inode(self) -> Inode:
        """What it names."""
        return self._inodes[self.ino]


class Directory(TimedInode):
    """A directory: its names in the order in which they were created."""

    __slots__ = ("_order", "entries", "next_cookie", "parent")

    def __init__(self, ino: Ino, mode: int, uid: int, gid: int, parent: Directory | None) -> None:
        super().__init__(ino, mode, uid, gid)
        self.nlink = 2
        self.parent: Directory = parent or self
        self.entries: dict[bytes, Entry] = {}
        self._order: Final[CookieOrder[Entry]] = CookieOrder()
        self.next_cookie = DOTDOT_COOKIE + 1  #: of the name that comes next

    def stat(self) -> Stat:
        """Return what stat(2) tells: the size is that of the entries, as on tmpfs."""
        return self._stat(size=(len(self.entries) + 2) * _DIRENT_BYTES)

    def add(self, name: bytes, inode: Inode) -> None:
        """Enter a name that is not there."""
        assert name not in self.entries
        self.entries[name] = entry = Entry(name, inode, self.next_cookie)
        self._order.append(entry)
        self.next_cookie += 1
        self.modified()
        if inode.is_dir:
            self.nlink += 1

    def restore(self, entries: Sequence[Entry]) -> None:
        """Enter the names that were there before, into a directory that has none. Cookies ascend."""
        self.entries = {entry.name: entry for entry in entries}
        self._order.extend(entries)

    def remove(self, name: bytes) -> Inode:
        """Remove a name and return what it named."""
        entry = self.entries.pop(name)
        self._order.remove(entry)
        self.modified()
        if entry.inode.is_dir:
            self.nlink -= 1
        return entry.inode

    def entries_after(self, cookie: int) -> Iterator[Entry]:
        """Generate the entries after a cookie, the newest first, as tmpfs lists them; all after those of . and ..

        Nothing may be changed meanwhile. What comes later has a larger cookie: a reader that has begun never sees it.
        """
        return self._order.below(cookie) if cookie > DOTDOT_COOKIE else self._order.newest_first()
