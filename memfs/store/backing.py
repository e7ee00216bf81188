"""Where bytes live: a store of anonymous files with one size limit, behind a small interface.

A backing makes empty files, opens them and says how much room there is. What is done to a file (fallocate, truncate,
read, write) is done with ordinary system calls on its descriptor, by file.py or, with passthrough, by the kernel
itself; the backing is asked only for room. A file that nobody uses needs no descriptor, so there can be more files than
descriptors: `locate` says how os.stat, os.utime and os.chmod find it.

- `TmpfsBacking`: a tmpfs mounted nowhere, with numbered files in its root. The kernel keeps the limit, whoever
  allocates, so ENOSPC is real and a runaway writer cannot take the machine down. Needs CAP_SYS_ADMIN. Guest-sealed
  files must never be swapped (RFC patch 01), which a tmpfs can only promise for all its files, so they lie in a second
  one with `noswap`. Both share one limit: what the guests' takes, the ordinary one is made smaller by, in steps, so
  that most allocations cost no system call.
- `MemfdBacking`: memfds, which anybody may make but which have no limit of the kernel's (a fallocate of 2**62 bytes on
  one ends in the OOM killer). So whoever allocates must `reserve` first; that is exact only because then no handle
  passes through, and every allocation goes by file.py. A memfd lives by its descriptor, so each file takes one.

Rejected: a directory on an existing tmpfs such as /dev/shm (others see the files and share the limit); one memfd as
an arena for all files (a punch would not be a punch any more, and passthrough needs a file per file).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import ClassVar, Final, NewType, Protocol

from memfs.contract.page_map import PageMaps
from memfs.contract.sys.libc import MOUNT_ATTR_NOATIME, mount_detached, remount_detached
from memfs.contract.units import bytes_to_pages, pages_to_bytes
from memfs.options import MountOptions, OptionError
from memfs.store.reaper import Reaper

Content = NewType("Content", int)  #: a backing's number for one of its files


class Backing(Protocol):
    """A store of anonymous files with one size limit."""

    kind: ClassVar[str]  #: for people: "tmpfs", "memfd"
    accounted: ClassVar[bool]  #: whether pages of ordinary files must be reserved, too
    reaper: Reaper  #: large files that nobody refers to any more
    page_maps: PageMaps  #: those of tracked files

    @property
    def guest_pinned(self) -> bool:
        """Whether pages of guest-sealed files are never swapped."""

    def create(self, number: int, *, guest: bool) -> Content:
        """Make an empty file. Of each number (> 0) there may be one that is for a guest and one that is not."""

    def open(self, content: Content) -> int:
        """A descriptor of a file, for reading and writing. Raises OSError(EMFILE)."""

    def shut(self, fd: int) -> None:
        """Undo one `open`."""

    def locate(self, content: Content) -> tuple[int | str, int | None]:
        """What os.stat, os.utime and os.chmod take for a file: a path or a descriptor, and `dir_fd`."""

    def free(self, content: Content) -> None:
        """Remove a file. Its memory lives until its last descriptor is closed."""

    def reserve(self, pages: int) -> None:
        """Take room for pages of a tracked file that will be allocated. Raises OSError(ENOSPC), taking nothing."""

    def unreserve(self, pages: int) -> None:
        """Give room back for pages that were freed, or reserved and not allocated."""

    def earmarked(self, pages: int) -> AbstractContextManager[bool]:
        """Earmark space for pages of an untracked file while they are allocated; true if there is enough."""

    @property
    def total_pages(self) -> int:
        """The limit, in pages."""

    @property
    def free_pages(self) -> int:
        """How many pages can still be allocated."""

    def resize(self, size: int) -> None:
        """Change the limit to `size` bytes. Raises OSError(EINVAL) below what is in use, changing nothing."""

    def close(self) -> None:
        """Let go of everything. Files live until their descriptors are closed."""


class TmpfsBacking:
    """Two tmpfs that are mounted nowhere and seen by nobody, one for ordinary files and one for guest-sealed ones.

    `size` in bytes, for both together; `options` go to both. Raises OSError: EPERM without CAP_SYS_ADMIN, ENOSYS before
    Linux 5.2, EINVAL (filename: the option) for an option that this kernel's tmpfs does not take.
    """

    kind: ClassVar[str] = "tmpfs"
    accounted: ClassVar[bool] = False

    _STEP: ClassVar[int] = 1024  # pages by which the guests' share grows at least

    def __init__(self, size: int, options: dict[str, str | None] | None = None, *, noatime: bool = False) -> None:
        self._total = bytes_to_pages(size)
        self._guest_used = 0  # pages that guest-sealed files have
        self._guest_share = 0  # pages that the ordinary tmpfs is smaller by
        self._earmarked = 0  # pages that are being allocated
        self.reaper = Reaper()
        self.page_maps = PageMaps()
        self._root: Final = _mount_tmpfs(size, options or {}, noatime)
        self._guest_root, self._guest_pinned = self._root, True
        try:
            self._guest_root = _mount_tmpfs(size, {**(options or {}), "noswap": None}, noatime)
        except OSError:  # before Linux 6.4
            self._guest_root, self._guest_pinned = _mount_tmpfs(size, options or {}, noatime), False

    @property
    def guest_pinned(self) -> bool:
        return self._guest_pinned

    def create(self, number: int, *, guest: bool) -> Content:
        content = Content(-number if guest else number)
        path, root = self.locate(content)
        os.mknod(path, 0o600, dir_fd=root)
        return content

    def open(self, content: Content) -> int:
        path, root = self.locate(content)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC, dir_fd=root)

    def shut(self, fd: int) -> None:
        os.close(fd)

    def locate(self, content: Content) -> tuple[str, int]:
        return str(content), self._guest_root if content < 0 else self._root

    def free(self, content: Content) -> None:
        path, root = self.locate(content)
        os.unlink(path, dir_fd=root)

    def reserve(self, pages: int) -> None:
        used = self._guest_used + pages
        if used > self._guest_share:
            try:
                self._set_guest_share(min(used + self._STEP, self._total))
            except OSError:
                self._set_guest_share(used)
        self._guest_used = used

    def unreserve(self, pages: int) -> None:
        assert pages <= self._guest_used, f"{pages} pages given back, {self._guest_used} in use"
        self._guest_used -= pages
        if self._guest_share - self._guest_used > 2 * self._STEP:
            with suppress(OSError):  # then ordinary files get that room the next time
                self._set_guest_share(self._guest_used + self._STEP)

    @contextmanager
    def earmarked(self, pages: int) -> Iterator[bool]:
        self._earmarked += pages  # some of it is there already, so this errs on the safe side
        try:
            yield self._earmarked <= self.free_pages
        finally:
            self._earmarked -= pages

    def _set_guest_share(self, pages: int) -> None:
        """Raises OSError(ENOSPC), changing nothing, if ordinary files have the room."""
        if pages > self._total:
            raise OSError(errno.ENOSPC, f"{pages} pages wanted, {self.free_pages} free")
        try:
            self._limit_ordinary(self._total - pages)
        except OSError as error:
            raise OSError(errno.ENOSPC, "ordinary files have the room") from error
        self._guest_share = pages

    def _limit_ordinary(self, pages: int) -> None:
        # To tmpfs 0 means no limit, so it keeps one page.
        remount_detached(self._root, {"size": str(pages_to_bytes(max(1, pages)))})

    @property
    def total_pages(self) -> int:
        return self._total

    @property
    def free_pages(self) -> int:
        ordinary = os.fstatvfs(self._root)
        return self._total - self._guest_used - (ordinary.f_blocks - ordinary.f_bfree)

    def resize(self, size: int) -> None:
        total = bytes_to_pages(size)
        if total < self._guest_used:
            raise OSError(errno.EINVAL, f"guest-sealed files have {self._guest_used} pages")
        self._limit_ordinary(total - self._guest_used)
        try:
            remount_detached(self._guest_root, {"size": str(size)})
        except OSError:  # an owner has allocated behind our back
            self._limit_ordinary(self._total - self._guest_share)
            raise
        self._total, self._guest_share = total, self._guest_used

    def close(self) -> None:
        os.close(self._root)
        os.close(self._guest_root)


def _mount_tmpfs(size: int, options: dict[str, str | None], noatime: bool) -> int:
    # Inodes are limited by the tree, which also counts directories; the backing must never be the first to run out.
    attributes = MOUNT_ATTR_NOATIME if noatime else 0
    return mount_detached("tmpfs", {"size": str(size), "nr_inodes": "0", **options}, attributes=attributes)


class MemfdBacking:
    """Memfds, and a count of their pages. `size` in bytes."""

    kind: ClassVar[str] = "memfd"
    accounted: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        self._total = bytes_to_pages(size)
        self._used = 0
        self.reaper = Reaper()
        self.page_maps = PageMaps()

    @property
    def guest_pinned(self) -> bool:
        return False

    def create(self, number: int, *, guest: bool) -> Content:
        return Content(os.memfd_create(f"memfs:{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))

    def open(self, content: Content) -> int:
        return content

    def shut(self, fd: int) -> None:
        """A memfd lives by its one descriptor."""

    def locate(self, content: Content) -> tuple[int, None]:
        return content, None

    def free(self, content: Content) -> None:
        os.close(content)

    def reserve(self, pages: int) -> None:
        if self._used + pages > self._total:
            raise OSError(errno.ENOSPC, f"{pages} pages wanted, {self.free_pages} free")
        self._used += pages

    def unreserve(self, pages: int) -> None:
        assert pages <= self._used, f"{pages} pages given back, {self._used} in use"
        self._used -= pages

    @contextmanager
    def earmarked(self, pages: int) -> Iterator[bool]:
        yield True  # they have been reserved

    @property
    def total_pages(self) -> int:
        return self._total

    @property
    def free_pages(self) -> int:
        return self._total - self._used

    def resize(self, size: int) -> None:
        if bytes_to_pages(size) < self._used:
            raise OSError(errno.EINVAL, f"{self._used} pages are in use")
        self._total = bytes_to_pages(size)

    def close(self) -> None:
        """Nothing is held."""


def open_backing(options: MountOptions) -> tuple[Backing, str | None]:
    """The backing that is asked for, or memfds where there can be no tmpfs; and then why (a sentence for people).

    Raises OptionError for an option that cannot be had.
    """
    if options.backing == "memfd":
        if options.tmpfs_options:
            raise OptionError(f"option {next(iter(options.tmpfs_options))} is for backing=tmpfs")
        return MemfdBacking(options.size), None
    try:
        return TmpfsBacking(options.size, options.tmpfs_options, noatime=_without_atime(options)), None
    except OSError as error:
        if error.filename in options.tmpfs_options:
            raise OptionError(f"option {error.filename}: this kernel's tmpfs does not take it") from error
        if options.tmpfs_options:
            raise OptionError(f"option {next(iter(options.tmpfs_options))} needs CAP_SYS_ADMIN") from error
        reason = os.strerror(error.errno or 0)
        return MemfdBacking(options.size), f"no detached tmpfs ({reason}): files live on memfds, and memfs keeps size="


def _without_atime(options: MountOptions) -> bool:
    """Whether reads leave access times alone. Without passthrough it is the daemon that reads, not who asked for it."""
    return options.atime == "noatime" or options.passthrough == "off"
