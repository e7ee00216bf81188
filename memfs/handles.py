"""Open files and directories: what the kernel's file handles (fh) stand for.

A handle holds its inode alive, and counts as a mapping if a program could map it: the kernel tells a FUSE server of
open and release, and release comes only after the last munmap, but of mmap itself it tells nothing.
"""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NewType

from memfs.tree import Directory, Entry, Inode, RegularFile, Tree

Fh = NewType("Fh", int)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open regular file."""

    inode: RegularFile
    flags: int  #: O_* as given to open(2)
    mappable: bool  #: whether mmap of it can succeed

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class OpenDirectory:
    """An open directory: the names it had when reading began, so that change does not disturb the reader."""

    __slots__ = ("_names", "inode")

    def __init__(self, inode: Directory) -> None:
        self.inode: Final = inode
        self._names: list[tuple[int, bytes]] | None = None

    def entries_after(self, cookie: int) -> Iterator[tuple[int, bytes, Entry]]:
        """What is left of the names after a cookie, with their entries; 0 begins anew (rewinddir(3))."""
        if cookie == 0 or self._names is None:
            self._names = self.inode.snapshot()
        for position in range(bisect.bisect_right(self._names, (cookie, b"\xff" * 256)), len(self._names)):
            number, name = self._names[position]
            entry = self.inode.entries.get(name)
            if entry is not None and entry.cookie == number:  # not removed meanwhile, nor replaced
                yield number, name, entry


class Handles:
    """All open handles of a mount. Raises OSError(EBADF) for a number that is none."""

    def __init__(self, tree: Tree) -> None:
        self._tree: Final = tree
        self._next = Fh(1)
        self._open: dict[Fh, OpenFile | OpenDirectory] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open_file(self, inode: RegularFile, flags: int) -> tuple[Fh, OpenFile]:
        """A handle for an open(2) with these flags."""
        handle = OpenFile(inode, flags, mappable=not (inode.file.guest or flags & os.O_DIRECT))
        inode.file.mappable_opens += handle.mappable
        return self._add(inode, handle), handle

    def open_directory(self, inode: Directory) -> Fh:
        """A handle for an opendir(3)."""
        return self._add(inode, OpenDirectory(inode))

    def file(self, fh: int) -> OpenFile:
        """The open file behind a number."""
        handle = self._open.get(Fh(fh))
        if not isinstance(handle, OpenFile):
            raise OSError(errno.EBADF, f"no open file {fh}")
        return handle

    def directory(self, fh: int) -> OpenDirectory:
        """The open directory behind a number."""
        handle = self._open.get(Fh(fh))
        if not isinstance(handle, OpenDirectory):
            raise OSError(errno.EBADF, f"no open directory {fh}")
        return handle

    def release(self, fh: int) -> None:
        """The last descriptor and mapping of it are gone."""
        handle = self._open.pop(Fh(fh), None)
        if handle is None:
            raise OSError(errno.EBADF, f"no open handle {fh}")
        if isinstance(handle, OpenFile):
            handle.inode.file.mappable_opens -= handle.mappable
        self._tree.release(handle.inode)

    def close(self) -> None:
        """Release everything; the mount is gone."""
        for fh in list(self._open):
            self.release(fh)

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        mappable: dict[int, int] = {}
        held: dict[int, int] = {}
        for handle in self._open.values():
            held[handle.inode.ino] = held.get(handle.inode.ino, 0) + 1
            if isinstance(handle, OpenFile):
                mappable[handle.inode.ino] = mappable.get(handle.inode.ino, 0) + handle.mappable
        for inode in self._tree.files():
            assert inode.file.mappable_opens == mappable.get(inode.ino, 0), f"inode {inode.ino}: mappable opens"
        for ino, count in held.items():
            assert self._tree.inode(ino).holds >= count, f"inode {ino}: fewer holds than handles"

    def _add(self, inode: Inode, handle: OpenFile | OpenDirectory) -> Fh:
        fh = self._next
        self._next = Fh(fh + 1)
        self._open[fh] = handle
        self._tree.hold(inode)
        return fh
