"""Where bytes live: a store of anonymous files with one size limit, behind a small interface.

A backing gives out descriptors of empty files and says how much room there is. What is done to a file (fallocate,
truncate, read, write) is done with ordinary system calls on its descriptor, by file.py or, with passthrough, by the
kernel itself; the backing is asked only for room.

- `TmpfsBacking`: a tmpfs mounted nowhere. The kernel keeps the limit, whoever allocates, so ENOSPC is real and a
  runaway writer cannot take the machine down. Needs CAP_SYS_ADMIN.
- `MemfdBacking`: memfds, which anybody may make but which have no limit of the kernel's (a fallocate of 2**62 bytes on
  one ends in the OOM killer). So whoever allocates must `reserve` first; that is exact only because then no handle
  passes through, and every allocation goes by file.py.

Rejected: a directory on an existing tmpfs such as /dev/shm (others see the files and share the limit); one memfd as
an arena for all files (a punch would not be a punch any more, and passthrough needs a file per file).
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar, Final, Protocol

from memfs.libc import mount_detached, remount_detached
from memfs.units import PAGE_SIZE, bytes_to_pages


class Backing(Protocol):
    """A store of anonymous files with one size limit."""

    kind: ClassVar[str]  #: for people: "tmpfs", "memfd"
    accounted: ClassVar[bool]  #: whether pages must be reserved before they are allocated

    def create(self, name: str) -> int:
        """A descriptor of a new, empty, anonymous file, open for reading and writing. `name` is for people."""

    def reserve(self, pages: int) -> None:
        """Take room for pages that will be allocated. Raises OSError(ENOSPC), taking nothing. No-op if unaccounted."""

    def unreserve(self, pages: int) -> None:
        """Give room back for pages that were freed, or reserved and not allocated. No-op if unaccounted."""

    @property
    def total_pages(self) -> int:
        """The limit, in pages."""

    @property
    def free_pages(self) -> int:
        """How many pages can still be allocated."""

    def resize(self, size: int) -> None:
        """Change the limit to `size` bytes. Raises OSError(EINVAL) below what is in use, changing nothing."""

    def close(self) -> None:
        """Let go of everything. Files given out live until their descriptors are closed."""


class TmpfsBacking:
    """A tmpfs that is mounted nowhere and seen by nobody.

    `size` in bytes. Raises OSError: EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.2.
    """

    kind: ClassVar[str] = "tmpfs"
    accounted: ClassVar[bool] = False

    def __init__(self, size: int, options: dict[str, str | None] | None = None) -> None:
        # Inodes are limited by the tree, which also counts directories; the backing must never be the first to run out.
        self._root: Final = mount_detached("tmpfs", {"size": str(size), "nr_inodes": "0", **(options or {})})

    def create(self, name: str) -> int:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._root)

    def reserve(self, pages: int) -> None:
        """The kernel reserves."""

    def unreserve(self, pages: int) -> None:
        """The kernel gives back."""

    @property
    def total_pages(self) -> int:
        return os.fstatvfs(self._root).f_blocks

    @property
    def free_pages(self) -> int:
        return os.fstatvfs(self._root).f_bfree

    def resize(self, size: int) -> None:
        remount_detached(self._root, {"size": str(size)})

    def close(self) -> None:
        os.close(self._root)


class MemfdBacking:
    """Memfds, and a count of their pages."""

    kind: ClassVar[str] = "memfd"
    accounted: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        self._total = bytes_to_pages(size)
        self._used = 0

    def create(self, name: str) -> int:
        return os.memfd_create(f"memfs:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def reserve(self, pages: int) -> None:
        if self._used + pages > self._total:
            raise OSError(errno.ENOSPC, f"{pages} pages wanted, {self.free_pages} free")
        self._used += pages

    def unreserve(self, pages: int) -> None:
        assert pages <= self._used, f"{pages} pages given back, {self._used} in use"
        self._used -= pages

    @property
    def total_pages(self) -> int:
        return self._total

    @property
    def free_pages(self) -> int:
        return self._total - self._used

    def resize(self, size: int) -> None:
        if size < self._used * PAGE_SIZE:
            raise OSError(errno.EINVAL, f"{self._used} pages are in use")
        self._total = bytes_to_pages(size)

    def close(self) -> None:
        """Nothing is held."""


def open_backing(size: int) -> tuple[Backing, str | None]:
    """The best backing to be had, and if that is not a tmpfs, why (a sentence for people)."""
    try:
        return TmpfsBacking(size), None
    except OSError as error:
        reason = (
            f"no detached tmpfs ({os.strerror(error.errno or 0)}): files live on memfds, and memfs keeps size= itself"
        )
        return MemfdBacking(size), reason
