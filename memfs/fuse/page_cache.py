"""What the kernel's page cache has and the backing has not: pages that were stored to through a mapping.

Without passthrough, files are mapped through the kernel's page cache. The kernel reads a page before a program stores
to it, says nothing of the store, and writes the page back later: at fsync(2), when the descriptor or the mapping is
closed, or within half a minute. If it was a hole, it is a hole in the backing until then, and a cp(1) or tar(1) that
believes that loses what was stored. So before anybody is told of holes and blocks, the kernel is asked for the content
of those pages (FUSE_NOTIFY_RETRIEVE); what is there and is not all zeros is data. (Zeros that were stored stay a hole,
which reads the same.)

Which pages may be like that is known: those that the kernel has read as holes and not written since, while somebody
has the file open for writing. What is remembered of that is bounded, for each user (`Pool`) and in all, and so is how
much stat(2) looks at, in pages and in runs of them. Beyond that a hole counts as data, which POSIX allows for every
hole; so no copy is ever wrong, but it may be larger.

Rejected:
- to have the kernel write the pages back, by FUSE_NOTIFY_INVAL_INODE: that also takes them out of the cache, even if
  they are pinned, and what a disk or another VMM then writes to the pinned page is lost to its program.
- to have a process of ours call fsync(2): it would need a descriptor of the mount, which umount(8) would find busy.
- to write to the backing what was retrieved: the kernel drops a page that is punched only after our answer, so what is
  retrieved in between would come back.
- to reserve or allocate space when a hole is read, so that a store never finds none: read(2) cannot be told from a
  mapping, and to read a sparse file would fill the filesystem.
- to answer LSEEK with ENOSYS, whereupon the kernel takes every file to be all data.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import trio

from memfs.contract.sparse import data_pages
from memfs.contract.units import (
    PAGE_SIZE,
    SECTORS_PER_PAGE,
    ByteOffset,
    PageIndex,
    PageRange,
    page_ceil,
    page_floor,
    page_offset,
)
from memfs.fuse.abi import NOTIFY_RETRIEVE_IN, Request, retrieve, unpack
from memfs.fuse.cached_holes import CachedHoles
from memfs.store.shares import Pool
from memfs.tree.inode import Ino, RegularFile

_PIECE: Final = 32  # pages that are retrieved at a time: FUSE_DEFAULT_MAX_PAGES_PER_REQ, which every kernel has
_MOST_PAGES: Final = 4096  # that stat(2) looks at
_MOST_GROUPS: Final = 1024  # of one file (CachedHoles), some 200 KB
_MOST_GROUPS_OF_ALL: Final = 1 << 16  # of all files, some 13 MB; each user has a share
_FIRST_UNIQUE: Final = 1 << 63  # the kernel numbers its own requests from 0 on

#: lseek(2) in the backing
Seek: TypeAlias = Callable[[ByteOffset, int], Awaitable[ByteOffset]]


@dataclass(slots=True)
class _Retrieval:
    """Pages that the kernel was asked for; of those that it has, which are not all zeros."""

    answered: trio.Event = field(default_factory=trio.Event)
    is_data: list[bool] = field(default_factory=list)


class PageCache:
    """The kernel's page cache, as far as it may differ from the backing.

    `notify` writes a notification to the kernel, and raises OSError. `most_groups` (CachedHoles) are remembered in all.
    """

    def __init__(self, notify: Callable[[bytes], None], most_groups: int = _MOST_GROUPS_OF_ALL) -> None:
        self._notify: Final = notify
        self._files: Final[dict[Ino, CachedHoles]] = {}  # of files that are open; none is empty but `unknown` ones
        self._groups: Final = Pool("groups of holes", most_groups, frozenset({0, os.geteuid()}))
        self._uniques: Final = itertools.count(_FIRST_UNIQUE)
        self._retrievals: Final[dict[int, _Retrieval]] = {}  # by unique

    # -- what the kernel reads and writes ---------------------------------------------------------------------------

    def has_read(self, inode: RegularFile, offset: ByteOffset, nbytes: int, user: int) -> None:
        """Note that the kernel has read a part of an open file into its cache, for a user."""
        if not nbytes:
            return
        pages = PageRange.covering(offset, nbytes)
        for hole in _between(data_pages(inode.file.fd, pages), pages):
            holes = self._files.get(inode.ino)
            if holes is None:
                holes = self._files[inode.ino] = CachedHoles(_MOST_GROUPS, user)
            before = len(holes)
            holes.add(hole, self._groups.room(holes.user))
            self._charge(holes, before)
            if holes.unknown:
                return

    def has_written(self, inode: RegularFile, offset: ByteOffset, nbytes: int) -> None:
        """Note that a part of an open file was written to the backing, whether from the cache or around it."""
        holes = self._files.get(inode.ino)
        if holes is not None and nbytes:
            self._discard(inode, holes, PageRange.covering(offset, nbytes))

    def forget(self, inode: RegularFile) -> bool:
        """Forget a file that nobody has open. Returns whether the kernel's cache of it has to be emptied."""
        holes = self._files.pop(inode.ino, None)
        if holes is None:
            return False
        if holes:
            self._groups.give_back(holes.user, len(holes))
        return True

    def _discard(self, inode: RegularFile, holes: CachedHoles, pages: PageRange) -> None:
        if self._files.get(inode.ino) is not holes:  # it was forgotten while somebody waited for the kernel's answer
            return
        before = len(holes)
        holes.discard(pages)
        self._charge(holes, before)
        if not holes and not holes.unknown:
            self._files.pop(inode.ino, None)

    def _charge(self, holes: CachedHoles, before: int) -> None:
        """Count what a file has now, and had `before`, for whoever read of it first."""
        if len(holes) > before:
            self._groups.take(holes.user, len(holes) - before)
        elif len(holes) < before:
            self._groups.give_back(holes.user, before - len(holes))

    def _which_may_be_dirty(self, inode: RegularFile) -> CachedHoles | None:
        return self._files.get(inode.ino) if inode.file.opens.writable else None

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        groups = sum(map(len, self._files.values()))
        assert self._groups.used == groups, f"{self._groups.used} groups of holes counted, {groups} there"
        assert groups <= self._groups.size, "more holes than may be remembered"
        assert all(holes or holes.unknown for holes in self._files.values()), "a file without holes"

    # -- what is told of it -----------------------------------------------------------------------------------------

    async def blocks(self, inode: RegularFile) -> int:
        """Return how many blocks of 512 bytes a file has in the cache and not in the backing. At most its size is."""
        holes = self._which_may_be_dirty(inode)
        if holes is None:
            return 0
        everything = PageRange(PageIndex(0), max(PageIndex(1), page_ceil(ByteOffset(inode.file.size))))
        runs, dirty, left = holes.first_runs(everything), list[PageRange](), _MOST_PAGES
        for run in runs:
            dirty += await self._look(inode, holes, run) if left > 0 else [run]
            left -= len(run)
        if runs and runs[-1].end < everything.end:
            dirty.append(PageRange(runs[-1].end, everything.end))
        # What was written meanwhile is not among the holes any more.
        count = len(everything) if holes.unknown else sum(map(holes.count, dirty))
        status = inode.file.stat()
        room = page_ceil(ByteOffset(status.st_size)) * SECTORS_PER_PAGE - status.st_blocks
        return max(0, min(count * SECTORS_PER_PAGE, room))

    async def seek(self, inode: RegularFile, offset: ByteOffset, whence: int, seek: Seek) -> ByteOffset:
        """Seek as lseek(2) with SEEK_DATA or SEEK_HOLE; `seek` does so in the backing. Raises OSError(ENXIO)."""
        holes = self._which_may_be_dirty(inode)
        if holes is None or not 0 <= offset < inode.file.size:
            return await seek(offset, whence)
        if whence == os.SEEK_DATA:
            return await self._seek_data(inode, holes, offset, seek)
        return await self._seek_hole(inode, holes, offset, seek)

    async def _seek_data(self, inode: RegularFile, holes: CachedHoles, offset: ByteOffset, seek: Seek) -> ByteOffset:
        data = await _data_or(ByteOffset(inode.file.size), seek, offset)
        if data == offset or holes.unknown:
            return offset
        rest: PageRange | None = PageRange.covering(offset, data - offset)
        while rest is not None and (runs := holes.first_runs(rest)):
            for run in runs:
                found = await self._look(inode, holes, run)
                if found:
                    return max(offset, found[0].offset)
            rest = PageRange(run.end, rest.end) if run.end < rest.end else None
        return await seek(offset, os.SEEK_DATA)  # again: some may have been written meanwhile

    async def _seek_hole(self, inode: RegularFile, holes: CachedHoles, offset: ByteOffset, seek: Seek) -> ByteOffset:
        size = ByteOffset(inode.file.size)
        while offset < size and not holes.unknown:
            offset = await seek(offset, os.SEEK_HOLE)
            first = page_floor(offset)
            run = next(holes.runs(PageRange(first, PageIndex(first + _PIECE))), None)
            found = await self._look(inode, holes, run) if run is not None and run.start == first else []
            if found and found[0].start == first:
                offset = page_offset(found[0].end)
            elif offset >= size or await seek(offset, os.SEEK_HOLE) == offset:  # again, as above
                break
        return offset if offset < size and not holes.unknown else size

    # -- asking the kernel ------------------------------------------------------------------------------------------

    async def _look(self, inode: RegularFile, holes: CachedHoles, run: PageRange) -> list[PageRange]:
        """Return which pages of a run of cached holes have data, in order."""
        found, position = list[PageRange](), run.start
        while position < run.end:
            piece = PageRange(position, PageIndex(min(run.end, position + _PIECE)))
            is_data = await self._retrieve(inode, holes, piece)
            for page, data in enumerate(is_data, piece.start):
                if data and found and found[-1].end == page:
                    found[-1] = PageRange(found[-1].start, PageIndex(page + 1))
                elif data:
                    found.append(PageRange(PageIndex(page), PageIndex(page + 1)))
            position = PageIndex(position + max(1, len(is_data)))
        return found

    async def _retrieve(self, inode: RegularFile, holes: CachedHoles, pages: PageRange) -> list[bool]:
        """Return of pages from the first on whether they have data, up to the first that is not in the cache."""
        unique, retrieval, before = next(self._uniques), _Retrieval(), holes.changes
        self._retrievals[unique] = retrieval
        try:
            self._notify(retrieve(unique, inode.ino, pages.offset, pages.nbytes))
            await retrieval.answered.wait()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # the kernel does not know it, or is unmounting
                raise
        finally:
            del self._retrievals[unique]
        is_data = retrieval.is_data[: len(pages)]
        if len(is_data) < len(pages) and holes.changes == before:
            absent = PageIndex(pages.start + len(is_data))
            self._discard(inode, holes, PageRange(absent, PageIndex(absent + 1)))
        return is_data

    async def retrieved(self, request: Request) -> None:
        """Take the kernel's answer to a retrieval, whose number it has. It wants no reply."""
        _, nbytes = unpack(NOTIFY_RETRIEVE_IN, request.body)
        content = request.body[NOTIFY_RETRIEVE_IN.size :][:nbytes]
        retrieval = self._retrievals.get(request.unique)
        if retrieval is None:  # who asked was interrupted
            return
        rest = len(content) % PAGE_SIZE  # of the file's last page
        pages = np.frombuffer(content[: len(content) - rest], np.uint64).reshape(-1, PAGE_SIZE // 8)
        retrieval.is_data = [count > 0 for count in np.count_nonzero(pages, axis=1).tolist()]
        if rest:
            retrieval.is_data.append(any(content[-rest:]))
        retrieval.answered.set()


async def _data_or(size: ByteOffset, seek: Seek, offset: ByteOffset) -> ByteOffset:
    """Return where data begins; the file's size if there is none from there on."""
    try:
        return await seek(offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size


def _between(runs: Iterator[PageRange], pages: PageRange) -> Iterator[PageRange]:
    """Generate what lies between runs within a range of pages."""
    position = pages.start
    for run in runs:
        if position < run.start:
            yield PageRange(position, run.start)
        position = run.end
    if position < pages.end:
        yield PageRange(position, pages.end)
