"""Which pages of a file there are, asked of its mount a bounded part at a time.

A file can have as many holes as pages. A look makes a number of system calls and no more, goes on where the one before
ended, and keeps what was known of the rest; so a file of few extents is seen anew with each look, and a fragmented one
as fast as the daemon is to be asked. In a picture a cell is mixed after its first few extents, so the rest of it is
passed over.
"""

from __future__ import annotations

import errno
import os
from typing import Final

import numpy as np

from memfs.contract.runs import NO_RUNS, Runs, merged, runs_of, within, without
from memfs.contract.units import PAGE_SIZE, PageIndex, PageRange, page_offset

_MOST_IN_A_CELL: Final = 8  # extents
_TRIES: Final = 3


class Extents:
    """The extents of one file, as far as they have been seen."""

    def __init__(self) -> None:
        self.runs: Runs = NO_RUNS
        self._position = PageIndex(0)

    def look(self, fd: int, pages: PageRange, cell: int, most_calls: int) -> bool:
        """Look at some of a range of pages, which a picture shows in cells of so many. Returns whether it was the end.

        Raises OSError.
        """
        start = self._position if pages.start <= self._position < pages.end else pages.start
        found: list[tuple[int, int]] = []
        position, calls, last_cell, in_cell = start, 0, -1, 0
        while position < pages.end and calls < most_calls:
            calls += 2
            extent = _next_extent(fd, position, pages.end)
            if extent is None:
                position = pages.end
                break
            found.append((extent.start, extent.end))
            position = extent.end
            number = (position - pages.start) // cell
            in_cell = in_cell + 1 if number == last_cell else 0
            last_cell = number
            if in_cell >= _MOST_IN_A_CELL:
                position = PageIndex(min(pages.end, pages.start + (number + 1) * cell))
        seen = np.array([[start, position]], np.int64)
        rest = without(within(self.runs, np.array([[pages.start, pages.end]], np.int64)), seen)
        runs = np.concatenate((rest, runs_of(found)))
        self.runs = merged(runs[runs[:, 0].argsort(kind="stable")])
        self._position = position if position < pages.end else PageIndex(0)
        return position >= pages.end


def _next_extent(fd: int, start: PageIndex, end: PageIndex) -> PageRange | None:
    """Return the first extent from a page on, as far as it lies before `end`; None: there is none.

    What is freed between the two calls has no end, so that it is asked again. Raises OSError(EIO) for places that are
    none: who serves a filesystem may say anything.
    """
    for _ in range(_TRIES):
        try:
            data = os.lseek(fd, page_offset(start), os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None
        if page_offset(start) <= data < hole:
            first, last = PageIndex(data // PAGE_SIZE), PageIndex(min(end, -(-hole // PAGE_SIZE)))
            return PageRange(first, last) if first < last else None
    raise OSError(errno.EIO, "where it says that it has data makes no sense")
