"""Where bytes live: a store of anonymous files with one size limit, behind a small interface.

A backing creates empty files, opens them and says how much space there is. Operations on a file (fallocate, truncate,
read, write) are ordinary system calls on its descriptor, by pages.py or, with passthrough, by the kernel itself; the
backing is asked only for space. A file that nobody uses needs no descriptor, so there can be more files than
descriptors: `locate` says how os.stat, os.utime and os.chmod find it.

- `TmpfsBacking`: a tmpfs mounted nowhere, with numbered files in its root. The kernel keeps the limit, whoever
  allocates, so ENOSPC is real and a runaway writer cannot take the machine down. Needs CAP_SYS_ADMIN. Guest-sealed
  files must never be swapped (RFC patch 01), which a tmpfs can only promise for all its files, so they lie in a second
  one with `noswap`. Both share one limit: what the guests' takes, the ordinary one is made smaller by, in steps, so
  that most allocations cost no system call.
- `MemfdBacking`: memfds, which anybody may create but which have no limit of the kernel's (a fallocate of 2**62 bytes
  on one ends in the OOM killer). So `reserve` comes before each allocation; that is exact only because no handle is in
  passthrough mode then, and every allocation goes by file.py. A memfd lives by its descriptor, so each file takes one.

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
        """Create an empty file. Of each number (> 0) there may be one that is for a guest and one that is not."""

    def open(self, content: Content) -> int:
        """Return a descriptor of a file, for reading and writing. Raises OSError(EMFILE)."""

    def shut(self, fd: int) -> None:
        """Undo one `open`."""

    def locate(self, content: Content) -> tuple[int | str, int | None]:
        """Return what os.stat, os.utime and os.chmod take for a file: a path or a descriptor, and `dir_fd`."""

    def free(self, content: Content) -> None:
        """Remove a file. Its memory lives until its last descriptor is closed."""

    def reserve(self, pages: int) -> None:
        """Reserve space for pages of a tracked file. Raises OSError(ENOSPC), reserving nothing."""

    def unreserve(self, pages: int) -> None:
        """Undo `reserve` for pages that were freed, or reserved and not allocated."""

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
        """Close the backing. Files live until their descriptors are closed."""


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
        """Whether this kernel has `noswap`."""
        return self._guest_pinned

    def create(self, number: int, *, guest: bool) -> Content:
        """Create an empty file: its content id is negative if it is for a guest."""
        content = Content(-number if guest else number)
        path, root = self.locate(content)
        os.mknod(path, 0o600, dir_fd=root)
        return content

    def open(self, content: Content) -> int:
        """Return a descriptor of a file."""
        path, root = self.locate(content)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC, dir_fd=root)

    def shut(self, fd: int) -> None:
        """Close the descriptor."""
        os.close(fd)

    def locate(self, content: Content) -> tuple[str, int]:
        """Return the path in the root of a tmpfs, and a descriptor of that."""
        return str(content), self._guest_root if content < 0 else self._root

    def free(self, content: Content) -> None:
        """Unlink the file."""
        path, root = self.locate(content)
        os.unlink(path, dir_fd=root)

    def reserve(self, pages: int) -> None:
        """Reserve pages of guest-sealed files, if need be by making the ordinary tmpfs smaller."""
        used = self._guest_used + pages
        if used > self._guest_share:
            try:
                self._set_guest_share(min(used + self._STEP, self._total))
            except OSError:
                self._set_guest_share(used)
        self._guest_used = used

    def unreserve(self, pages: int) -> None:
        """Undo `reserve`; what the ordinary tmpfs is smaller by follows in steps."""
        assert pages <= self._guest_used, f"{pages} pages unreserved, {self._guest_used} in use"
        self._guest_used -= pages
        if self._guest_share - self._guest_used > 2 * self._STEP:
            with suppress(OSError):  # then ordinary files get that space the next time
                self._set_guest_share(self._guest_used + self._STEP)

    @contextmanager
    def earmarked(self, pages: int) -> Iterator[bool]:
        """Earmark space in the ordinary tmpfs."""
        self._earmarked += pages  # some of it is there already, so this errs on the safe side
        try:
            yield self._earmarked <= self.free_pages
        finally:
            self._earmarked -= pages

    def _set_guest_share(self, pages: int) -> None:
        """Take space from ordinary files. Raises OSError(ENOSPC), changing nothing, if they have it in use."""
        if pages > self._total:
            raise OSError(errno.ENOSPC, f"{pages} pages are needed, {self.free_pages} are free")
        try:
            self._limit_ordinary(self._total - pages)
        except OSError as error:
            raise OSError(errno.ENOSPC, "ordinary files have the space") from error
        self._guest_share = pages

    def _limit_ordinary(self, pages: int) -> None:
        # To tmpfs 0 means no limit, so it keeps one page.
        remount_detached(self._root, {"size": str(pages_to_bytes(max(1, pages)))})

    @property
    def total_pages(self) -> int:
        """The limit of both tmpfs together, in pages."""
        return self._total

    @property
    def free_pages(self) -> int:
        """How many pages can still be allocated in either tmpfs."""
        ordinary = os.fstatvfs(self._root)
        return self._total - self._guest_used - (ordinary.f_blocks - ordinary.f_bfree)

    def resize(self, size: int) -> None:
        """Change the limits of both tmpfs."""
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
        """Close the roots of both tmpfs."""
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
        """False: memfds may be swapped."""
        return False

    def create(self, number: int, *, guest: bool) -> Content:
        """Create a memfd; its descriptor is the content id."""
        return Content(os.memfd_create(f"memfs:{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))

    def open(self, content: Content) -> int:
        """Return the descriptor."""
        return content

    def shut(self, fd: int) -> None:
        """Do nothing: a memfd lives by its one descriptor."""

    def locate(self, content: Content) -> tuple[int, None]:
        """Return the descriptor."""
        return content, None

    def free(self, content: Content) -> None:
        """Close the descriptor."""
        os.close(content)

    def reserve(self, pages: int) -> None:
        """Count pages that will be allocated."""
        if self._used + pages > self._total:
            raise OSError(errno.ENOSPC, f"{pages} pages are needed, {self.free_pages} are free")
        self._used += pages

    def unreserve(self, pages: int) -> None:
        """Count pages that were freed, or not allocated."""
        assert pages <= self._used, f"{pages} pages unreserved, {self._used} in use"
        self._used -= pages

    @contextmanager
    def earmarked(self, pages: int) -> Iterator[bool]:
        """Do nothing: the pages have been reserved."""
        yield True

    @property
    def total_pages(self) -> int:
        """The limit, in pages."""
        return self._total

    @property
    def free_pages(self) -> int:
        """How many pages are not reserved."""
        return self._total - self._used

    def resize(self, size: int) -> None:
        """Change the limit."""
        if bytes_to_pages(size) < self._used:
            raise OSError(errno.EINVAL, f"{self._used} pages are in use")
        self._total = bytes_to_pages(size)

    def close(self) -> None:
        """Do nothing: every memfd is a file's."""


def open_backing(options: MountOptions) -> tuple[Backing, str | None]:
    """Open the backing that is asked for, or memfds where there can be no tmpfs; and then say why, for people.

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
    """Whether reads leave access times alone. Without passthrough the daemon reads, not the program."""
    return options.atime == "noatime" or options.passthrough == "off"
