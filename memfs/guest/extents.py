"""Where a sparse file has data, without touching what it has not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from memfs.units import ByteOffset, PageRange, page_offset


def data_pages(fd: int, pages: PageRange) -> Iterator[PageRange]:
    """The parts of a range that hold data, by SEEK_DATA and SEEK_HOLE (lseek(2)); nothing is touched or allocated.

    On tmpfs, pages that were allocated and never written count as holes.
    """
    position, end = pages.offset, page_offset(pages.end)
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return
            raise
        if start >= end:
            return
        position = ByteOffset(min(os.lseek(fd, start, os.SEEK_HOLE), end))
        yield PageRange.covering(ByteOffset(start), position - start)
