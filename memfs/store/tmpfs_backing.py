"""Files on a tmpfs that is mounted nowhere and seen by nobody.

The kernel keeps the limit, whoever allocates, so ENOSPC is real and a runaway writer cannot take the machine down.
Needs CAP_SYS_ADMIN. Ordinary files are numbered ones in its root. Guest-sealed files lie on a filesystem of their own
(guest_mounts.py), a tmpfs that is never swapped or a hugetlbfs. Both share one limit: what the guests' takes, or is to
keep, the ordinary one is made smaller by, page for page, so that space is short only where statfs(2) says so. Where
there is plenty of space, what guests have freed goes back to the ordinary one a moment later: to change its limit takes
longer than to allocate a page, and most of what a conversion frees another one allocates. What an owner allocates
behind memfs's back is in use as well: the kernel is asked how much there is. Page maps lie in a third one, without a
limit, of which owners get descriptors through a mount that is read-only.

Rejected: a directory on an existing tmpfs such as /dev/shm (others see the files and share the limit).
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import trio
from trio.lowlevel import ParkingLot

from memfs.contract.page_map import MapFiles, MapMemfds
from memfs.contract.sys.libc import (
    ATIME_ATTRIBUTES,
    MOUNT_ATTR__ATIME,
    MOUNT_ATTR_RDONLY,
    Remount,
    clone_detached,
    set_mount_attributes,
)
from memfs.contract.units import ByteOffset, bytes_to_pages, pages_to_bytes
from memfs.store.backing import Content
from memfs.store.converted import Converted
from memfs.store.guest_mounts import (
    GuestHugetlb,
    GuestMount,
    GuestTmpfs,
    Step,
    describe_huge,
    mount_tmpfs,
    pages_in,
)
from memfs.store.reaper import Reaper
from memfs.store.strays import Watched

_BALLAST: Final = 1  # pages of the ordinary tmpfs that nobody may have
_MOMENT: Final = 0.01  # seconds until what guests have freed goes back to ordinary files that have
_PLENTY: Final = bytes_to_pages(256 << 20)  # which nobody fills in a moment

_BALLAST_NAME: Final = "ballast"
_NEW: Final = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class State:
    """A tmpfs for what is not content: descriptors of its root, and of the same on a mount that is read-only."""

    root: int
    read_only: int


@dataclass(frozen=True, slots=True)
class Roots:
    """What a backing consists of that does not end with its process: descriptors of the roots of its filesystems."""

    ordinary: int
    guests: int
    state: State
    guest_pinned: bool  #: whether the guests' is never swapped


class TmpfsBacking:
    """A tmpfs for ordinary files, and what guest-sealed ones lie on, mounted nowhere and seen by nobody.

    `size` in bytes, for both together; `options` go to each tmpfs. With a `pagesize`, guest-sealed files lie on huge
    pages of so many bytes, of which `min_size` bytes are reserved. Raises OSError: EPERM without CAP_SYS_ADMIN, ENOSYS
    before Linux 5.2, EINVAL (filename: the option) for an option that this kernel's tmpfs does not take, and as
    `GuestHugetlb`. With `roots`, it is one that another process has made with the same arguments, and is `recovered`.
    """

    kind: ClassVar[str] = "tmpfs"
    most_files: ClassVar[int] = sys.maxsize
    accounted: ClassVar[bool] = False

    def __init__(
        self,
        size: int,
        options: dict[str, str | None] | None = None,
        pagesize: int | None = None,
        min_size: int = 0,
        roots: Roots | None = None,
    ) -> None:
        self._total = bytes_to_pages(size)
        self._guest_reserved = 0  # pages that guest-sealed files have, or are about to have
        self._guest_share = 0  # pages that the ordinary tmpfs is smaller by
        self._earmarked = 0  # pages that are being allocated
        self._lent = 0  # pages of guest-sealed files that are about to be freed, and count as free already
        self._is_running = False
        self._is_returning = False  # what guests have freed goes back in a moment
        self._freed: Final = ParkingLot()  # `_return_freed` waits for guests to free pages
        self.reaper = Reaper()
        self.converted = Converted()
        self._huge: Final = (options or {}).get("huge")
        limit = pages_to_bytes(self._total + _BALLAST)
        self._root: Final = mount_tmpfs(limit, options or {}) if roots is None else roots.ordinary
        mounted = (roots.guests, roots.guest_pinned) if roots is not None else None
        try:
            self._guests: Final[GuestMount] = (
                GuestHugetlb(pagesize, min_size, mounted) if pagesize else GuestTmpfs(size, options or {}, mounted)
            )
        except OSError:
            os.close(self._root)
            raise
        self._remount = Remount(self._root)
        if roots is None:
            self._load_ballast()
            self._set_guest_share(self._guest_claim)
        self.state = _open_state() if roots is None else roots.state
        self.page_maps: Final = MapMemfds() if self.state is None else MapFiles(self.state.root, self.state.read_only)

    @property
    def roots(self) -> Roots | None:
        """What another process can go on with; None if there are page maps that end with this one."""
        if self.state is None:
            return None
        return Roots(self._root, self._guests.root, self.state, self._guests.pinned)

    def _load_ballast(self) -> None:
        # To tmpfs a size of 0 is no limit, so where guests have all there is, one page must be allowed and taken.
        # A symbolic link's target takes exactly that, also where files are given huge pages.
        os.symlink("x" * 1024, _BALLAST_NAME, dir_fd=self._root)

    @property
    def guest_pinned(self) -> bool:
        """Whether the filesystem that they lie on is."""
        return self._guests.pinned

    @property
    def guest_granule(self) -> int:
        """A page of the filesystem that they lie on."""
        return self._guests.granule

    @property
    def guest_needs_steps(self) -> bool:
        """Whether it has huge pages, some of which would be allocated for less."""
        return self._huge is not None

    def guest_steps(self, offset: ByteOffset, length: int) -> Iterator[Step]:
        """Generate the steps of the filesystem that they lie on."""
        return self._guests.steps(offset, length)

    def create(self, number: int, *, guest: bool) -> tuple[Content, int]:
        """Create an empty file: its content id is negative if it is for a guest."""
        content = self.find(number, guest=guest)
        path, root = self.locate(content)
        try:
            fd = os.open(path, _NEW, 0o600, dir_fd=root)
        except FileExistsError:  # of a process that was killed before it could say so
            os.unlink(path, dir_fd=root)
            fd = os.open(path, _NEW, 0o600, dir_fd=root)
        return content, fd

    def find(self, number: int, *, guest: bool) -> Content:
        """Return the content id: negative if it is for a guest."""
        return Content(-number if guest else number)

    def recovered(self, total_pages: int, guest_pages: int) -> None:
        """Ask the kernel how large the ordinary tmpfs may be, and for new ways to change that."""
        self._total, self._guest_reserved = total_pages, guest_pages
        self._guest_share = self._total + _BALLAST - os.fstatvfs(self._root).f_blocks
        self._remount = Remount(self._root)
        self._guests.recovered()
        self._adjust_guest_share()

    def remove_others(self, known: Set[int], guests: Set[int], end: int) -> Callable[[], None]:
        """Remove what another process has left of files that are not known: content and page maps.

        Call before any is created.

        `known` are their numbers, and `guests` those that are for a guest; none is as large as `end`, and those below
        it are given to no other file. So what may still be created goes now: it is empty, for nobody was told of it.
        The rest may be large. What is returned removes that, at any time, in a thread.
        """
        wanted = (known - guests) | {-number for number in guests}
        others = [(content, functools.partial(self.free, Content(content))) for content in self._contents() - wanted]
        others += [(-number, functools.partial(self.page_maps.remove, str(number))) for number in self._maps() - guests]
        rest = list[Callable[[], None]]()
        for content, remove in others:
            number = abs(content)
            if number >= end or (content < 0 and number in known):
                remove()
            else:
                rest.append(remove)

        def remove_rest() -> None:
            for remove in rest:
                remove()

        return remove_rest

    def _contents(self) -> set[int]:
        names = [name for root in (self._root, self._guests.root) for name in os.listdir(f"/proc/self/fd/{root}")]
        names.remove(_BALLAST_NAME)
        return set(map(int, names))

    def _maps(self) -> set[int]:
        """Return the numbers of the files that have a page map, which lie beside the log of the state."""
        if self.state is None:
            return set()
        return {int(name) for name in os.listdir(f"/proc/self/fd/{self.state.root}") if name.isdecimal()}

    def open(self, content: Content) -> int:
        """Return a descriptor of a file."""
        path, root = self.locate(content)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC, dir_fd=root)

    def shut(self, fd: int) -> None:
        """Close the descriptor."""
        os.close(fd)

    def locate(self, content: Content) -> tuple[str, int]:
        """Return the path in the root of a filesystem, and a descriptor of that."""
        return str(content), self._guests.root if content < 0 else self._root

    def free(self, content: Content) -> None:
        """Unlink the file."""
        path, root = self.locate(content)
        os.unlink(path, dir_fd=root)

    def reserve(self, pages: int, given: int = 0) -> None:
        """Reserve pages of guest-sealed files, by making the ordinary tmpfs smaller.

        By what ordinary files give, it is made smaller when they have given it (`unreserve`).
        """
        if not pages:
            return
        self._guests.check_available(pages, self._guest_reserved)
        if pages > given:
            try:
                self._make_room(pages - given)
            except OSError:
                self._guests.count()  # some of what owners had by themselves may have gone
                self._make_room(pages - given)
        self._guest_reserved += pages

    @contextmanager
    def lend(self, pages: int) -> Iterator[None]:
        """Make the ordinary tmpfs larger by what guest-sealed files are about to give."""
        self._lent += pages
        self._adjust_guest_share()
        try:
            yield
        except BaseException:
            self._lent -= pages
            self._adjust_guest_share()
            raise
        self._lent -= pages  # which makes a difference when the pages are unreserved: then there is none

    def _make_room(self, pages: int) -> None:
        needed = max(self._guest_pages + pages, self._guests.least_pages)
        if needed > self._guest_share:
            self._set_guest_share(needed)

    def unreserve(self, pages: int) -> None:
        """Undo `reserve`, and make the ordinary tmpfs larger."""
        assert pages <= self._guest_reserved, f"{pages} pages unreserved, {self._guest_reserved} in use"
        self._guest_reserved -= pages
        if not self._is_running or not (self._is_returning or os.fstatvfs(self._root).f_bfree > _PLENTY):
            self._adjust_guest_share()
        elif not self._is_returning:
            self._is_returning = True  # there was plenty a moment ago, so until then nobody has to look again
            self._freed.unpark_all()

    async def run(self) -> None:
        """Free large files, and return to ordinary files what guests have freed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reaper.run)
            nursery.start_soon(self._return_freed)

    async def _return_freed(self) -> None:
        self._is_running = True
        try:
            while True:
                if not self._is_returning:
                    await self._freed.park()
                await trio.sleep(_MOMENT)
                self._is_returning = False
                self._adjust_guest_share()
        finally:
            self._is_running = False
            self._adjust_guest_share()

    def watch(self, file: Watched) -> None:
        """Leave it to what guest-sealed files lie on; the kernel says how much of a tmpfs is in use."""
        self._guests.watch(file)

    def unwatch(self, file: Watched) -> None:
        """Undo `watch`."""
        self._guests.unwatch(file)

    @contextmanager
    def earmarked(self, pages: int) -> Iterator[bool]:
        """Earmark space in the ordinary tmpfs."""
        self._earmarked += pages  # some of it is there already, so this errs on the safe side
        try:
            yield self._earmarked <= self.free_pages
        finally:
            self._earmarked -= pages

    @property
    def _guest_pages(self) -> int:
        """How many pages guest-sealed files have or are about to have, whoever allocates them."""
        return self._guests.used_pages(self._guest_reserved)

    @property
    def _guest_claim(self) -> int:
        """How many pages ordinary files may not have."""
        return max(self._guest_pages, self._guests.least_pages)

    def _adjust_guest_share(self) -> None:
        """Leave to ordinary files what guests have not, as far as ordinary files do not have more already."""
        with suppress(OSError):
            claim = max(self._guest_pages - self._lent, self._guests.least_pages)
            self._set_guest_share(min(claim, self._total))

    def _set_guest_share(self, pages: int) -> None:
        """Leave ordinary files all but so many pages. Raises OSError(ENOSPC), changing nothing, if they have more."""
        if pages == self._guest_share:
            return
        if pages > self._total:
            raise OSError(errno.ENOSPC, f"{pages} pages are needed, {self._total} are there")
        try:
            self._limit_ordinary(self._total - pages)
        except OSError as error:
            raise OSError(errno.ENOSPC, "ordinary files have the space") from error
        self._guest_share = pages

    def _limit_ordinary(self, pages: int) -> None:
        self._remount({"size": str(pages_to_bytes(pages + _BALLAST))})

    @property
    def total_pages(self) -> int:
        """The limit of both filesystems together, in pages."""
        return self._total

    @property
    def used_pages(self) -> int:
        """How many pages are in use in either filesystem."""
        self._guests.count()
        return self._guest_pages + self._ordinary_pages

    @property
    def _ordinary_pages(self) -> int:
        return pages_in(self._root) - _BALLAST

    @property
    def free_pages(self) -> int:
        """How many pages ordinary files can still get; what owners have taken is not left to others then."""
        self._guests.count()
        self._adjust_guest_share()
        return max(0, self._total - self._guest_claim - self._ordinary_pages)

    def describe(self) -> dict[str, Any]:
        """Return how huge pages are used, and the state of what guest-sealed files lie on."""
        ordinary = describe_huge(self._huge) if self._huge is not None else {}
        of_guests = {"guest_used": pages_to_bytes(self._guest_pages), **self._guests.describe()}
        return {**ordinary, **of_guests}

    def resize(self, size: int) -> None:
        """Change the limits of both filesystems."""
        total, guest = bytes_to_pages(size), self._guest_claim
        if total < guest:
            raise OSError(errno.EINVAL, f"guest-sealed files have {guest} pages")
        self._limit_ordinary(total - guest)
        try:
            self._guests.resize(size)
        except OSError:  # an owner has allocated meanwhile
            self._limit_ordinary(self._total - self._guest_share)
            raise
        self._total, self._guest_share = total, guest

    def set_access_times(self, atime: str) -> None:
        """Change the mount option of both filesystems."""
        for root in (self._root, self._guests.root):
            set_mount_attributes(root, ATIME_ATTRIBUTES[atime], MOUNT_ATTR__ATIME)

    def close(self) -> None:
        """Close the roots of both filesystems."""
        self._remount.close()
        self._guests.close()
        os.close(self._root)
        if self.state is not None:
            os.close(self.state.root)
            os.close(self.state.read_only)


def _open_state() -> State | None:
    """Mount the tmpfs for what is not content; None where it cannot be cloned."""
    root = mount_tmpfs(0, {})
    try:
        read_only = clone_detached(root)
    except OSError:  # before Linux 6.15
        os.close(root)
        return None
    set_mount_attributes(read_only, MOUNT_ATTR_RDONLY, 0)
    return State(root, read_only)
