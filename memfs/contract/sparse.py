"""Where a sparse file has data, without touching its holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from memfs.contract.page_ranges import PageRanges
from memfs.contract.sys.libc import cachestat
from memfs.contract.units import PAGE_SHIFT, ByteOffset, PageIndex, PageRange, page_offset


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Return the parts of [start, end) that hold data, by SEEK_DATA and SEEK_HOLE (lseek(2)): (start, end) in bytes.

    On tmpfs, pages that were allocated and never written count as holes.
    """
    position = start
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return
            raise
        if data >= end:
            return
        position = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield data, position


def allocated_pages(fd: int, pages: PageRange) -> int:
    """Return how many pages of a range a file of a tmpfs has, also those that were never written.

    Before Linux 6.5, only how many hold data.
    """
    return allocated_in_each(fd, PageRanges.single(pages))[0]


def allocated_in_each(fd: int, ranges: PageRanges) -> list[int]:
    """Return the same for each of some ranges. Time goes with their pages, and not with what lies between them.

    So much does lseek(2) not promise: SEEK_DATA walks over all that was allocated and never written.
    """
    try:
        return cachestat(fd, [(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT) for start, end in ranges.pairs()])
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return [sum(map(len, data_pages(fd, pages))) for pages in ranges]


def occupied(fd: int, pages: PageRange, most: int) -> Iterator[PageRange]:
    """Return the parts of a range, each with at most `most` of its pages in a file of a tmpfs, outside which are none.

    As far as `allocated_pages` knows; a part may be much larger than what it has.
    """
    there = allocated_pages(fd, pages)
    if there > most and len(pages) > 1:
        middle = PageIndex((pages.start + pages.end) // 2)
        yield from occupied(fd, PageRange(pages.start, middle), most)
        yield from occupied(fd, PageRange(middle, pages.end), most)
    elif there:
        yield pages


def data_pages(fd: int, pages: PageRange) -> Iterator[PageRange]:
    """Return the parts of a range of pages that hold data."""
    for start, end in data_extents(fd, pages.offset, page_offset(pages.end)):
        yield PageRange.covering(ByteOffset(start), end - start)
