"""What of a file lies in the backing: size and times, a descriptor while it is held, and the inode lock.

Size and times belong to the backing file; nothing here caches them, because with kernel passthrough they change without
us. A descriptor is open while the file is **held**: by an open handle, a registration, or a change that is being made.
Of a file that merely exists everything can be said without one, so there can be more files than descriptors.

Whoever has the inode lock holds the file, so a lock need not outlive the descriptor, and most files have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from memfs.contract.units import SECTORS_PER_PAGE
from memfs.store.backing import Backing, Content

_CLOSED: Final = -1


class Backed:
    """A file of a backing. `number` is the file's for ever, and no other's there. All methods raise OSError."""

    __slots__ = ("_backing", "_content", "_holds", "_lock", "fd", "number")

    def __init__(self, backing: Backing, number: int, content: Content) -> None:
        self._backing: Final = backing
        self._content = content
        self.number: Final = number
        self.fd = _CLOSED  #: of the backing file, while the file is held
        self._holds = 0
        self._lock: trio.Lock | None = None

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self.stat().st_size

    @property
    def pages(self) -> int:
        """How many pages are allocated, beyond the file's size included."""
        return self.stat().st_blocks // SECTORS_PER_PAGE

    def stat(self) -> os.stat_result:
        """Size, blocks and times, as the backing file has them. Nothing else in it is the file's."""
        path, dir_fd = self._locate()
        return os.stat(path, dir_fd=dir_fd)

    def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set access and modification time, in nanoseconds since the epoch."""
        path, dir_fd = self._locate()
        os.utime(path, ns=(atime_ns, mtime_ns), dir_fd=dir_fd)

    def touch_ctime(self) -> None:
        """The inode was changed: bring the backing's ctime up to date, which is the file's."""
        path, dir_fd = self._locate()
        os.chmod(path, 0o600, dir_fd=dir_fd)

    def _locate(self) -> tuple[int | str, int | None]:
        return (self.fd, None) if self.fd != _CLOSED else self._backing.locate(self._content)

    def hold(self) -> None:
        """Keep `fd` open until `release`. Can be nested. Raises OSError(EMFILE), changing nothing."""
        if not self._holds:
            self.fd = self._backing.open(self._content)
        self._holds += 1

    def release(self) -> None:
        """Undo one `hold`."""
        self._holds -= 1
        if not self._holds:
            self._backing.shut(self.fd)
            self.fd = _CLOSED
            self._lock = None  # nobody waits for it: whoever does holds the file

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the file for a while."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def locked(self) -> _Locked:
        """Have the inode lock, within an async with statement."""
        self._lock = self._lock or trio.Lock()
        return _Locked(self, self._lock)

    @property
    def is_locked(self) -> bool:
        """Whether somebody has the inode lock."""
        return self._lock is not None and self._lock.locked()


class _Locked:
    """`Backed.locked`. Does not yield if the lock is free."""

    __slots__ = ("_file", "_lock")

    def __init__(self, file: Backed, lock: trio.Lock) -> None:
        self._file: Final = file
        self._lock: Final = lock

    async def __aenter__(self) -> None:
        self._file.hold()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            try:
                await self._lock.acquire()
            except BaseException:
                self._file.release()
                raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
        self._file.release()
