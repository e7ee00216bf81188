"""What of a file lies in the backing: its size, times and blocks, and a descriptor while the file is held.

Size and times belong to the backing file; nothing here caches them, because with kernel passthrough they change without
us. A descriptor is open while the file is **held**: by an open handle, a registration, or a change that is in progress.
A file that nobody holds is looked up by its path in the backing, so there can be more files than descriptors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Final

from memfs.contract.units import SECTORS_PER_PAGE
from memfs.store.backing import Backing, Content

_CLOSED: Final = -1


class BackingFile:
    """A file of a backing, empty at first unless it `exists`. `number` is this file's for ever. Methods raise OSError.

    `guest` as for `Backing.create`. A new one may be `held` from the beginning, which saves opening it.
    """

    __slots__ = ("_backing", "_content", "fd", "holds", "number")

    def __init__(self, backing: Backing, number: int, *, guest: bool, exists: bool = False, held: bool = False) -> None:
        self._backing: Final = backing
        self.number: Final = number
        self.fd = _CLOSED  #: the file's descriptor while it is held
        self.holds = 0  #: how many `hold` there are without their `release`
        self._content: Content
        if exists:
            self._content = backing.find(number, guest=guest)
            return
        self._content, self.fd = backing.create(number, guest=guest)
        self.holds = 1
        if not held:
            self.release()

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        if self.fd != _CLOSED:
            return os.fstat(self.fd).st_size  # lseek(2) is shorter, and waits for whoever looks for data in a thread
        return self.stat().st_size

    @property
    def pages(self) -> int:
        """How many pages are allocated, those beyond the file's size included."""
        return self.stat().st_blocks // SECTORS_PER_PAGE

    def stat(self) -> os.stat_result:
        """Return size, blocks and times. The other fields are not those of the memfs file."""
        path, dir_fd = self._locate()
        return os.stat(path, dir_fd=dir_fd)

    def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set access and modification time, in nanoseconds since the epoch."""
        path, dir_fd = self._locate()
        os.utime(path, ns=(atime_ns, mtime_ns), dir_fd=dir_fd)

    def touch_ctime(self) -> None:
        """Set the ctime to now."""
        path, dir_fd = self._locate()
        os.chmod(path, 0o600, dir_fd=dir_fd)

    def _locate(self) -> tuple[int | str, int | None]:
        return (self.fd, None) if self.fd != _CLOSED else self._backing.locate(self._content)

    def hold(self) -> None:
        """Keep `fd` open until `release`. Can be nested. Raises OSError(EMFILE), changing nothing."""
        if not self.holds:
            self.fd = self._backing.open(self._content)
        self.holds += 1

    def release(self) -> None:
        """Undo one `hold`."""
        self.holds -= 1
        if not self.holds:
            self._backing.shut(self.fd)
            self.fd = _CLOSED

    def replace_with_guest(self) -> Callable[[], None]:
        """Take an empty guest file in place of this one, with its times. Call while it is held.

        Returns what frees this one; a descriptor of it that somebody has kept leads nowhere then. On OSError nothing
        has changed.
        """
        old = self.stat()
        content, fd = self._backing.create(self.number, guest=True)
        self._backing.shut(self.fd)
        free_old = functools.partial(self._backing.free, self._content)
        self._content, self.fd = content, fd
        self.set_times(old.st_atime_ns, old.st_mtime_ns)
        return free_old

    def free(self) -> None:
        """Free the file and its memory. Nobody may hold it."""
        assert not self.holds, f"file {self.number} is freed while held"
        self._backing.free(self._content)
