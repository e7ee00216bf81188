"""Where guest-sealed files lie, beside a TmpfsBacking's ordinary ones: a filesystem that is mounted nowhere.

- `GuestTmpfs`: a tmpfs with `noswap`, for guest memory must never be swapped (RFC patch 01), and a tmpfs can only
  promise that for all its files. With `huge=` its kernel allocates 2 MiB where 4 KiB are asked for; then nobody could
  say what a file has, for a guest-sealed file's page is private if and only if it is allocated. So huge pages are
  switched off for the moment in which less than an aligned block of 2 MiB is allocated, and are had for all others.
  What khugepaged fills later, where an owner has mapped a file with holes, counts as what that owner has allocated.
- `GuestHugetlb`: a hugetlbfs, whose pages come out of the machine's pool and cannot be split. Its size cannot be
  changed (a remount says yes and does nothing), and its count of pages grows with each allocation that fails (seen on
  Linux 6.18; with it goes what `min_size=` has reserved). So the limit is kept by the account alone, and the pool is
  looked at before an allocation is tried. An owner that allocates behind memfs's back is limited by the pool, as
  everybody is who creates a memfd with MFD_HUGETLB.

Rejected: to account for whole blocks of 2 MiB on a tmpfs with `huge=` (after a punch the kernel splits them, or not if
somebody has pinned the page, so the account would be a guess).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Protocol

from memfs.contract.sys.hugetlb import Pool
from memfs.contract.sys.libc import MOUNT_ATTR_NOATIME, Remount, mount_detached
from memfs.contract.units import ORDER_2M, PAGE_SIZE, ByteOffset, bytes_to_pages, pages_to_bytes
from memfs.store.strays import Strays, Watched

_BLOCK: Final = pages_to_bytes(1 << ORDER_2M)
_OF_THE_MACHINE: Final = {"machine_shmem_huge": "ShmemHugePages", "machine_shmem_huge_mapped": "ShmemPmdMapped"}


#: Bytes to allocate, from an offset on, and within what
Step = tuple[ByteOffset, int, AbstractContextManager[object]]


class GuestMount(Protocol):
    """A filesystem of guest-sealed files."""

    @property
    def root(self) -> int:
        """A descriptor of its root."""

    @property
    def pinned(self) -> bool:
        """Whether pages are never swapped."""

    @property
    def granule(self) -> int:
        """In what multiples, in bytes, files get and lose pages."""

    @property
    def least_pages(self) -> int:
        """How many pages are kept for guests."""

    def used_pages(self, accounted: int) -> int:
        """Return how many pages are in use, of 4 KiB, given how many are accounted for; perhaps as last counted."""

    def count(self) -> None:
        """Count what owners have allocated by themselves."""

    def watch(self, file: Watched) -> None:
        """Have a file counted by `count`, for an owner has a descriptor of it."""

    def unwatch(self, file: Watched) -> None:
        """Undo `watch`, if it was called."""

    def check_available(self, pages: int, accounted: int) -> None:
        """Raise OSError(ENOSPC) if it is known that so many pages more cannot be had."""

    def steps(self, offset: ByteOffset, length: int) -> Iterator[Step]:
        """Generate in which calls to allocate bytes, so that no page is allocated besides."""

    def resize(self, size: int) -> None:
        """Take notice that the limit is `size` bytes now. Raises OSError(EINVAL), changing nothing."""

    def recovered(self) -> None:
        """Go on where another process was killed."""

    def describe(self) -> dict[str, Any]:
        """Return its state for `memfs stat`, numbers in bytes."""

    def close(self) -> None:
        """Close it."""


def mount_tmpfs(size: int, options: dict[str, str | None]) -> int:
    """Mount a tmpfs of `size` bytes nowhere, and return a descriptor of its root. Raises OSError."""
    # Inodes are limited by the tree, which also counts directories; the backing must never be the first to run out.
    return mount_detached("tmpfs", {"size": str(size), "nr_inodes": "0", **options}, attributes=MOUNT_ATTR_NOATIME)


#: A filesystem that another process has mounted: a descriptor of its root, and whether it is never swapped
Mounted = tuple[int, bool]


class GuestTmpfs:
    """A tmpfs that may become `size` bytes large, which may be `mounted`. Raises OSError as `mount_tmpfs`."""

    granule = PAGE_SIZE
    least_pages = 0

    def __init__(self, size: int, options: dict[str, str | None], mounted: Mounted | None = None) -> None:
        self._huge: Final = options.get("huge")
        self.root, self.pinned = mounted or _mount_pinned(size, options)
        self._remount = Remount(self.root)
        self._switching: Final = threading.Lock()

    def used_pages(self, accounted: int) -> int:
        """Return how many the kernel says, or more while some are being allocated."""
        return max(accounted, pages_in(self.root))

    def count(self) -> None:
        """Do nothing: the kernel counts."""

    def watch(self, file: Watched) -> None:
        """Do nothing."""

    def unwatch(self, file: Watched) -> None:
        """Do nothing."""

    def check_available(self, pages: int, accounted: int) -> None:
        """Do nothing: what is within the limit can be had."""

    def steps(self, offset: ByteOffset, length: int) -> Iterator[Step]:
        """Generate whole blocks of 2 MiB, which may become huge pages, and what is before and after them, which not."""
        if self._huge is None:
            yield offset, length, nullcontext()
            return
        end = offset + length
        first, last = -(-offset // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
        if first >= last:
            yield offset, length, self._small_pages()
            return
        for start, stop in ((offset, first), (first, last), (last, end)):
            if start < stop:
                yield ByteOffset(start), stop - start, nullcontext() if start == first else self._small_pages()

    @contextmanager
    def _small_pages(self) -> Iterator[None]:
        """Have the kernel allocate no huge pages. Who allocates whole blocks meanwhile gets small ones as well."""
        with self._switching:
            self._remount({"huge": "never"})
            try:
                yield
            finally:
                self._remount({"huge": self._huge})

    def resize(self, size: int) -> None:
        """Change the kernel's limit."""
        with self._switching:
            self._remount({"size": str(size)})

    def recovered(self) -> None:
        """Have huge pages again, if they were switched off at that moment."""
        self._remount = Remount(self.root)
        if self._huge is not None:
            self._remount({"huge": self._huge})

    def describe(self) -> dict[str, Any]:
        """Return nothing: it is as the ordinary tmpfs."""
        return {}

    def close(self) -> None:
        """Close the descriptors."""
        self._remount.close()
        os.close(self.root)


def _mount_pinned(size: int, options: dict[str, str | None]) -> Mounted:
    try:
        return mount_tmpfs(size, {**options, "noswap": None}), True
    except OSError:  # before Linux 6.4
        return mount_tmpfs(size, options), False


class GuestHugetlb:
    """A hugetlbfs with pages of `pagesize` bytes, of which `min_size` bytes are reserved; it may be `mounted`.

    Raises OSError: EPERM without CAP_SYS_ADMIN; filename "pagesize" if the kernel has no such pages; ENOMEM (filename:
    "min_size") if the pool has not so many.
    """

    pinned = True  # it is never swapped

    def __init__(self, pagesize: int, min_size: int = 0, mounted: Mounted | None = None) -> None:
        self.granule: Final = pagesize
        reserved = -(-min_size // pagesize) * pagesize
        self.least_pages: Final = bytes_to_pages(reserved)
        self._pool: Final = Pool(pagesize)
        self._strays: Final = Strays()
        options: dict[str, str | None] = {"pagesize": str(pagesize)}
        if reserved:
            options["min_size"] = str(reserved)
        if mounted is not None:
            self.root, _ = mounted
            return
        try:
            self.root = mount_detached("hugetlbfs", options, attributes=MOUNT_ATTR_NOATIME)
        except OSError as error:
            if error.errno == errno.ENOMEM and reserved:
                error.filename = "min_size"
            raise

    def used_pages(self, accounted: int) -> int:
        """Return how many are accounted for, and what owners had by themselves when that was last counted."""
        return accounted + self._strays.pages

    def count(self) -> None:
        """Count what owners have allocated by themselves."""
        self._strays.count()

    def watch(self, file: Watched) -> None:
        """Have a file counted."""
        self._strays.watch(file)

    def unwatch(self, file: Watched) -> None:
        """Do not count it any more."""
        self._strays.unwatch(file)

    def check_available(self, pages: int, accounted: int) -> None:
        """Look into the pool, of which this mount's own reserve is a part."""
        reserve = max(0, self.least_pages - self.used_pages(accounted))
        if pages > reserve and not self._pool.has(pages_to_bytes(pages - reserve) // self.granule):
            raise OSError(errno.ENOSPC, f"the pool has {self._pool.available} pages of {self.granule} bytes")

    def steps(self, offset: ByteOffset, length: int) -> Iterator[Step]:
        """Generate one step: the kernel rounds to huge pages, which these bytes are."""
        yield offset, length, nullcontext()

    def resize(self, size: int) -> None:
        """Refuse to have a limit below what is reserved."""
        if bytes_to_pages(size) < self.least_pages:
            raise OSError(errno.EINVAL, f"{pages_to_bytes(self.least_pages)} bytes are reserved for guests")

    def recovered(self) -> None:
        """Do nothing."""

    def describe(self) -> dict[str, Any]:
        """Return what the pool has, and what this mount has of it."""
        size, pool = self.granule, self._pool
        of_the_pool = {"pool": pool.pages, "pool_free": pool.free, "pool_reserved": pool.reserved}
        return {
            "min_size": pages_to_bytes(self.least_pages),
            **{name: pages * size for name, pages in of_the_pool.items()},
        }

    def close(self) -> None:
        """Close the descriptor; what is reserved returns to the pool when the last file is closed."""
        os.close(self.root)


def pages_in(root: int) -> int:
    """Return how many pages are in use in the tmpfs with this root."""
    space = os.fstatvfs(root)
    return space.f_blocks - space.f_bfree


def describe_huge(huge: str) -> dict[str, Any]:
    """Return for `memfs stat` how a tmpfs uses huge pages, and how much of the machine's shared memory is in some.

    Of a single mount the kernel does not say that. In bytes.
    """
    with open("/proc/meminfo") as lines:
        machine = {name: value for name, _, value in (line.partition(":") for line in lines)}
    kib = {key: int(machine[name].split()[0]) for key, name in _OF_THE_MACHINE.items() if name in machine}
    return {"huge": huge, **{key: value << 10 for key, value in kib.items()}}
