"""Which pages of a guest-sealed file are allocated, that is, private: one byte a page in a shared memory object.

This is the truth about private pages. The backing file is not: it holds bytes, and only its owner may look whether
there are any. The object is a file in memory, so that the owner (kvmsim) maps the same memory and asks for a page's
state with an array look-up instead of a message. The store alone writes, and keeps its maps in one of two ways:

- `MapFiles`: files of a tmpfs. Owners get descriptors through a clone of its mount that is read-only, which they cannot
  open anew for writing either. A file lies there whether or not somebody has it open.
- `MapMemfds`: memfds, which live by their descriptors. Once the store's own mapping exists a memfd is sealed with
  F_SEAL_FUTURE_WRITE, so that it can be mapped read-only at best.

    byte 0      u64 magic   u32 version   u32 page shift   u64 seq
    byte 4096   one byte for page 0 (ABSENT or ALLOCATED), one for page 1, ...

`seq` is a sequence lock: odd while a change is being made, and larger by two after it. A reader that must see several
pages of one moment samples seq, reads, and reads again if seq was odd or has moved. A single byte needs no seq.

The object is as sparse as the file it describes: MAX_PAGES bytes of address space, of which only what is allocated
costs memory (a page of map for 16 MiB of file). A page of map goes when nothing in its 16 MiB is allocated any more. Of
a small change that is asked only when the next one is somewhere else: a page that is converted again and again would
otherwise have its map freed and allocated each time. A memfd that is sealed with F_SEAL_FUTURE_WRITE cannot be punched,
so there all that was ever allocated costs memory, until the map is closed. Clearing, counting and finding pages in a
large range asks the object for its data extents first, so no operation costs more than the pages that were ever
touched. To read a hole through a mapping of it would allocate that (shmem_fault()), and pages of map are memory that
nobody pays for. So the methods that take ranges, which come from system calls of strangers, read holes by pread(2),
which allocates nothing. It never grows or shrinks, so an owner's mapping of it cannot fault. Address space has an end,
too: a store has at most MOST_MAPS, and then there is no space for another map, rather than for anything at all.

Rejected: a bitmap (a byte can be stored without reading its neighbours, so no lock between pages, and numpy slices
do everything); SEEK_DATA on the backing file (a system call for each look-up, and false for passthrough handles).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import ClassVar, Final, TypeVar

import numpy as np
import numpy.typing as npt

from memfs.contract.page_ranges import NO_PAGES, PageRanges
from memfs.contract.sparse import data_extents
from memfs.contract.sys.constants import F_SEAL_FUTURE_WRITE
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import ORDER_2M, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange

ABSENT: Final = 0
ALLOCATED: Final = 1
MAX_PAGES: Final = 1 << 32  #: a guest-sealed file is at most 16 TiB; the largest memslot of KVM is half of that

MOST_MAPS: Final = 24_000  #: three quarters of the 2**47 bytes of address space of a process

_MAGIC: Final = int.from_bytes(b"memfsmap", "little")
_VERSION: Final = 1
_HEADER: Final = np.dtype([("magic", "<u8"), ("version", "<u4"), ("page_shift", "<u4"), ("seq", "<u8")])
_HEADER_BYTES: Final = PAGE_SIZE
_ALLOCATED_BYTE: Final = bytes([ALLOCATED])
_FREED_AT_ONCE: Final = 8  # pages of map, each of which takes a system call
_STATES: Final = PAGE_SIZE  # bytes of a page of the object
_OBJECT_BYTES: Final = _HEADER_BYTES + MAX_PAGES
_SPARSE_FROM: Final = 1 << 16  # pages; for shorter ranges asking for the extents costs more than reading them
_AT_ONCE: Final = 1 << 16  # pages whose runs are found at a time, for a caller that needs only the first few
_READ_AT_ONCE: Final = 1 << 16  # pages that are read around those asked for
_PAIRED_AT_ONCE: Final = 512  # edges of runs, an even number
_TRIES: Final = 10_000  # to read a map that is being changed, which takes the store microseconds

_BLOCK: Final = 1 << ORDER_2M

_Bytes = npt.NDArray[np.uint8]
_T = TypeVar("_T", bound=np.generic)


def _extents(fd: int, pages: PageRange) -> Iterator[PageRange]:
    """Return the parts of a range in which the object has data at all; a short range as a whole."""
    if len(pages) < _SPARSE_FROM:
        yield pages
        return
    for start, end in data_extents(fd, _HEADER_BYTES + pages.start, _HEADER_BYTES + pages.end):
        yield PageRange(PageIndex(start - _HEADER_BYTES), PageIndex(end - _HEADER_BYTES))


def _pairs(edges: npt.NDArray[np.int64]) -> Iterator[tuple[PageIndex, PageIndex]]:
    """Generate an array's elements two by two, a few at a time, for a caller that needs only the first."""
    for first in range(0, len(edges), _PAIRED_AT_ONCE):
        for one, other in edges[first : first + _PAIRED_AT_ONCE].reshape(-1, 2).tolist():
            yield PageIndex(one), PageIndex(other)


def _edges(states: npt.NDArray[np.bool_] | _Bytes) -> npt.NDArray[np.int64]:
    """Return where runs of ALLOCATED, or True, begin and end, in turn: int64, indexes, of shape (n,), n > 0."""
    inside = np.flatnonzero(states[1:] != states[:-1]) + 1
    begins, ends = [0] if states[0] else [], [len(states)] if states[-1] else []
    return np.concatenate((begins, inside, ends)).astype(np.int64, copy=False)


class PageMapView:
    """A page map that can be read: the store's own, or one received with Registered.

    `fd` is duplicated. Raises ValueError if it is not a page map of this version.
    """

    _access: int = mmap.PROT_READ

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != _OBJECT_BYTES:
            raise ValueError("not a page map: wrong size")
        self._map = mmap.mmap(fd, _OBJECT_BYTES, prot=self._access)
        header = np.frombuffer(self._map, _HEADER, 1)[0]
        self._check_header(header)
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        self._seq: npt.NDArray[np.uint64] = np.frombuffer(
            self._map, np.uint64, 1, _HEADER.fields["seq"][1] if _HEADER.fields else 0
        )
        #: uint8, shape (MAX_PAGES,): ABSENT or ALLOCATED for each page
        self.pages: _Bytes = np.frombuffer(self._map, np.uint8, MAX_PAGES, _HEADER_BYTES)

    def _check_header(self, header: np.void) -> None:
        if (header["magic"], header["version"], header["page_shift"]) != (_MAGIC, _VERSION, PAGE_SHIFT):
            raise ValueError("not a page map of this version")

    @property
    def seq(self) -> int:
        """The sequence lock: odd while the store is changing the map."""
        return int(self._seq[0])

    def is_allocated(self, index: PageIndex) -> bool:
        """Return whether one page is allocated."""
        return bool(self.pages[index] == ALLOCATED)

    def states(self, indexes: npt.NDArray[np.int64]) -> _Bytes:
        """Return ABSENT or ALLOCATED for many pages, as they are at one moment: uint8 of the same shape.

        The store may be changing the map meanwhile; then they are read again. If it does not come to an end with that
        (it may have died), all are ABSENT.
        """
        return self._at_one_moment(lambda: self.pages[indexes], np.full(indexes.shape, ABSENT, np.uint8))

    def whole_blocks(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Say which aligned blocks of 2 MiB, by page index / 512, are wholly allocated; likewise of one moment."""
        words = self.pages.view(np.uint64).reshape(-1, _BLOCK // 8)  # eight pages in a word
        full = np.uint64(int.from_bytes([ALLOCATED] * 8, "little"))
        return self._at_one_moment(lambda: (words[numbers] == full).all(axis=1), np.zeros(len(numbers), np.bool_))

    def _at_one_moment(self, read: Callable[[], npt.NDArray[_T]], otherwise: npt.NDArray[_T]) -> npt.NDArray[_T]:
        for _ in range(_TRIES):
            before = self.seq
            value = read()
            if before % 2 == 0 and self.seq == before:
                return value
            os.sched_yield()
        return otherwise

    def count_all(self, ranges: PageRanges) -> int:
        """Return how many pages of some ranges are allocated."""
        if ranges.only is not None:
            return self.count(ranges.only)
        return int(self._counts(ranges).sum())

    def with_any(self, ranges: PageRanges, state: int) -> tuple[PageRanges, int]:
        """Return those of some ranges that have a page in one state, and how many such pages there are."""
        if ranges.only is not None:
            count = self.count(ranges.only)
            if state == ABSENT:
                count = len(ranges.only) - count
            return (ranges if count else NO_PAGES), count
        counts = self._counts(ranges)
        if state == ABSENT:
            counts = ranges.array[:, 1] - ranges.array[:, 0] - counts
        has_any = counts > 0
        return (ranges if has_any.all() else PageRanges(ranges.array[has_any])), int(counts.sum())

    def _counts(self, ranges: PageRanges) -> npt.NDArray[np.int64]:
        if not len(ranges) or ranges.pages >= _SPARSE_FROM:
            return np.fromiter(map(self.count, ranges), np.int64, len(ranges))
        lengths = ranges.array[:, 1] - ranges.array[:, 0]
        first = np.cumsum(lengths) - lengths
        is_allocated = self._read_at(ranges.indexes()) == ALLOCATED
        counts: npt.NDArray[np.int64] = np.add.reduceat(is_allocated, first, dtype=np.int64)
        return counts

    def _read(self, pages: PageRange) -> _Bytes:
        """Return the states of a range, of which holes of the object stay holes."""
        return np.frombuffer(os.pread(self._fd, len(pages), _HEADER_BYTES + pages.start), np.uint8)

    def _read_at(self, indexes: npt.NDArray[np.int64]) -> _Bytes:
        """Return the states of pages, given in ascending order, of which holes of the object stay holes."""
        if not len(indexes):
            return np.empty(0, np.uint8)
        first, last = int(indexes[0]), int(indexes[-1])
        if os.lseek(self._fd, _HEADER_BYTES + first, os.SEEK_HOLE) > _HEADER_BYTES + last:
            return self.pages[indexes]
        starts = np.flatnonzero(np.diff(indexes // _READ_AT_ONCE, prepend=-1))
        ends = np.append(starts[1:], len(indexes))
        windows = np.stack((starts, ends, indexes[starts], indexes[ends - 1] + 1), axis=1).tolist()
        states = list[bytes]()
        for start, end, low, high in windows:
            window = os.pread(self._fd, high - low, _HEADER_BYTES + low)
            if end - start < high - low:
                window = np.frombuffer(window, np.uint8)[indexes[start:end] - low].tobytes()
            states.append(window)
        return np.frombuffer(b"".join(states), np.uint8)

    def select(self, ranges: PageRanges, state: int) -> PageRanges:
        """Return the maximal runs of pages in ranges that are in one state."""
        if ranges.only is not None and self.count(ranges.only) == (len(ranges.only) if state == ALLOCATED else 0):
            return ranges
        if ranges.only is not None and ranges.pages <= _AT_ONCE:
            edges = _edges(self._read(ranges.only) == state) + ranges.only.start
            return PageRanges(edges.reshape(-1, 2))
        if ranges.pages <= _AT_ONCE:
            indexes = ranges.indexes()
            return PageRanges.of_indexes(indexes[self._read_at(indexes) == state])
        runs = [(run.start, run.end) for pages in ranges for run in self.runs(pages, state)]
        return PageRanges(np.array(runs, np.int64).reshape(-1, 2))

    def count(self, pages: PageRange) -> int:
        """Return how many pages of a range are allocated."""
        if pages.end - pages.start == 1:
            return int(os.pread(self._fd, 1, _HEADER_BYTES + pages.start) == _ALLOCATED_BYTE)
        if len(pages) < _SPARSE_FROM:
            return int(np.count_nonzero(self._read(pages)))
        return sum(int(np.count_nonzero(self.pages[part.slice])) for part in _extents(self._fd, pages))

    def runs(self, pages: PageRange, state: int = ALLOCATED) -> Iterator[PageRange]:
        """Return the maximal runs of pages in a range that are in one state (ALLOCATED or ABSENT), in order."""
        if state == ABSENT:
            position = pages.start
            for run in self.runs(pages):
                if position < run.start:
                    yield PageRange(position, run.start)
                position = run.end
            if position < pages.end:
                yield PageRange(position, pages.end)
            return
        open_run: PageRange | None = None  # a run may continue in the next part
        for part in (part for extent in _extents(self._fd, pages) for part in extent.chunks(_AT_ONCE)):
            for start, end in _pairs(_edges(self._read(part)) + part.start):
                if open_run is not None and open_run.end == start:
                    open_run = PageRange(open_run.start, end)
                    continue
                if open_run is not None:
                    yield open_run
                open_run = PageRange(start, end)
        if open_run is not None:
            yield open_run

    def close(self) -> None:
        """Unmap the map and close the descriptor. Arrays taken from `pages` must be gone."""
        del self.pages, self._seq
        self._map.close()
        os.close(self._fd)


class PageMap(PageMapView):
    """A page map on the store's side, the only one that can be written. An object that is empty becomes an empty map.

    `fd` is duplicated. Raises OSError: EMFILE.

    >>> fd = os.memfd_create("map")
    >>> page_map = PageMap(fd)
    >>> page_map.set(PageRange(PageIndex(2), PageIndex(5)), ALLOCATED)
    >>> page_map.count(PageRange(PageIndex(0), PageIndex(4)))
    2
    >>> list(page_map.runs(PageRange(PageIndex(0), PageIndex(9))))
    [PageRange(start=2, end=5)]
    >>> page_map.close()
    """

    _access = mmap.PROT_READ | mmap.PROT_WRITE

    def __init__(self, fd: int) -> None:
        if not os.fstat(fd).st_size:
            os.ftruncate(fd, _OBJECT_BYTES)
        super().__init__(fd)
        self._is_punched = True  # as long as the object can be
        self._cleared: Final[OrderedDict[int, None]] = OrderedDict()  # pages of map that may be empty now

    def _check_header(self, header: np.void) -> None:
        if not header["magic"]:
            header["version"], header["page_shift"] = _VERSION, PAGE_SHIFT
            header["magic"] = _MAGIC
        super()._check_header(header)

    @property
    def fd(self) -> int:
        """The store's descriptor."""
        return self._fd

    @property
    def nbytes(self) -> int:
        """How much memory the object takes, in bytes."""
        return os.fstat(self._fd).st_blocks * 512

    def set(self, pages: PageRange, state: int) -> None:
        """Put every page of a range into one state, as one change."""
        self._seq[0] += 1
        try:
            if pages.end - pages.start == 1:
                self._map[_HEADER_BYTES + pages.start] = state  # a fifth of what numpy takes
            else:
                parts = _extents(self._fd, pages) if state == ABSENT and len(pages) >= _SPARSE_FROM else [pages]
                for part in parts:
                    self.pages[part.slice] = state
        finally:
            self._seq[0] += 1
        if state == ABSENT:
            first, last = pages.start // _STATES, (pages.end - 1) // _STATES
            if first == last and first in self._cleared and len(self._cleared) == 1:
                return
            self._free_covered(first, last)
            self._free_behind((first, last))

    def set_all(self, ranges: PageRanges, state: int) -> None:
        """Put every page of some ranges into one state, as one change."""
        if ranges.only is not None:
            self.set(ranges.only, state)
            return
        self._seq[0] += 1
        try:
            if ranges.pages < _SPARSE_FROM:
                self.pages[ranges.indexes()] = state
            else:
                for pages in ranges:
                    self.pages[pages.slice] = state
        finally:
            self._seq[0] += 1
        if state == ABSENT and len(ranges):
            first, last = ranges.array[:, 0] // _STATES, (ranges.array[:, 1] - 1) // _STATES
            for each in np.flatnonzero(first + 1 < last):
                self._free_covered(int(first[each]), int(last[each]))
            self._free_behind(sorted({*first.tolist(), *last.tolist()}))

    def _free_covered(self, first: int, last: int) -> None:
        """Free the pages of map between two in which a range that was cleared begins and ends."""
        if first + 1 < last and self._is_punched:
            self._punch(first + 1, last)

    def _free_behind(self, numbers: Iterable[int]) -> None:
        """Note in which pages of map something was cleared last, and free some that are empty, but the last one."""
        if not self._is_punched:
            return
        for number in numbers:
            self._cleared[number] = None
            self._cleared.move_to_end(number)
        self._free_some(1)

    def _free_some(self, rest: int) -> None:
        for _ in range(min(_FREED_AT_ONCE, len(self._cleared) - rest)):
            self._free_if_empty(self._cleared.popitem(last=False)[0])

    def _free_if_empty(self, number: int) -> None:
        start = _HEADER_BYTES + number * _STATES
        if self._map.find(_ALLOCATED_BYTE, start, start + _STATES) < 0:
            self._punch(number, number + 1)

    def _punch(self, first: int, end: int) -> None:
        try:
            fallocate(self._fd, PUNCH_HOLE, _HEADER_BYTES + first * _STATES, (end - first) * _STATES)
        except OSError:  # it is sealed, or no memory; the map says the same all the while
            self._is_punched = False

    def close(self) -> None:
        """Close it as a view is closed, and free what is empty."""
        self._free_some(0)
        super().close()

    def settle(self) -> None:
        """End a change in the middle of which the store died."""
        self._seq[0] += self._seq[0] % 2


class PageMaps(ABC):
    """The page maps of a store, at most `most` of them open."""

    are_kept: ClassVar[bool]  #: whether a map that was closed is still there when it is opened again

    def __init__(self, most: int = MOST_MAPS) -> None:
        self._most: Final = most
        self._count = 0

    def open(self, name: str) -> PageMap:
        """Open a map; one that is not there is made, and empty. Raises OSError: ENOSPC if too many are open, EMFILE."""
        if self._count >= self._most:
            raise OSError(errno.ENOSPC, f"there are {self._most} page maps, for which there is address space")
        fd = self._open(name)
        try:
            page_map = PageMap(fd)
            self._protect(page_map)
        finally:
            os.close(fd)
        self._count += 1
        return page_map

    def exists(self, name: str) -> bool:
        """Return whether there is a map that is not open."""
        return False

    @abstractmethod
    def _open(self, name: str) -> int: ...

    @abstractmethod
    def _protect(self, page_map: PageMap) -> None:
        """See that nobody else can write to it."""

    @abstractmethod
    def open_for_owner(self, name: str, page_map: PageMap) -> int:
        """Return a descriptor of an open map for an owner, to whom it is read-only. Raises OSError."""

    def close(self, page_map: PageMap) -> None:
        """Close a map that nobody uses now."""
        page_map.close()
        self._count -= 1

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a map that is closed, if there is one."""


class MapMemfds(PageMaps):
    """Maps that are memfds."""

    are_kept = False

    def _open(self, name: str) -> int:
        fd = os.memfd_create(f"memfs-map:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o400)  # so that an owner, which gets it for reading, cannot open it anew for writing
        return fd

    def _protect(self, page_map: PageMap) -> None:
        seals = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(page_map.fd, fcntl.F_ADD_SEALS, seals)

    def open_for_owner(self, name: str, page_map: PageMap) -> int:
        """Open the memfd anew, for reading."""
        return os.open(f"/proc/self/fd/{page_map.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def remove(self, name: str) -> None:
        """Do nothing: it is gone."""


class MapFiles(PageMaps):
    """Maps that are files: `root` is a descriptor of their directory, `read_only` one of it on a read-only mount."""

    are_kept = True

    def __init__(self, root: int, read_only: int, most: int = MOST_MAPS) -> None:
        super().__init__(most)
        self._root: Final = root
        self._read_only: Final = read_only

    def _open(self, name: str) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._root)

    def _protect(self, page_map: PageMap) -> None:
        """Do nothing: nobody else gets to the directory."""

    def exists(self, name: str) -> bool:
        """Return whether there is a file."""
        try:
            os.stat(name, dir_fd=self._root)
        except FileNotFoundError:
            return False
        return True

    def open_for_owner(self, name: str, page_map: PageMap) -> int:
        """Open the file for reading, where it cannot be written to."""
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._read_only)

    def remove(self, name: str) -> None:
        """Unlink the file."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._root)
