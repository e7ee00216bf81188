"""Which extents of frame numbers are taken, and by whom (contract/frame_numbers.py says what they are)."""

from __future__ import annotations

import errno
import heapq
from typing import Final

from memfs.contract.frame_numbers import EXTENT_PAGES, MAX_EXTENTS
from memfs.contract.units import PageIndex, Pfn


class FrameAllocator:
    """Which extents are taken. The lowest free one is given out first."""

    def __init__(self) -> None:
        self._next = 1
        self._free: list[int] = []

    def take(self) -> int:
        """An extent's number. Raises OSError(ENOMEM) when all are taken."""
        if self._free:
            return heapq.heappop(self._free)
        if self._next >= MAX_EXTENTS:
            raise OSError(errno.ENOMEM, "all frame numbers are taken")
        self._next += 1
        return self._next - 1

    def give_back(self, extent: int) -> None:
        """The extent may be given to somebody else."""
        heapq.heappush(self._free, extent)

    @property
    def taken(self) -> int:
        """How many extents are given out."""
        return self._next - 1 - len(self._free)


class FileFrames:
    """The extents of one registration."""

    def __init__(self, allocator: FrameAllocator) -> None:
        self._allocator: Final = allocator
        self._extents: dict[int, int] = {}  # by the page's gibibyte in the file

    def pfn(self, index: PageIndex) -> Pfn:
        """The frame of a page; an extent is taken when the first page of a gibibyte is asked for."""
        gibibyte, within = divmod(index, EXTENT_PAGES)
        extent = self._extents.get(gibibyte)
        if extent is None:
            extent = self._extents[gibibyte] = self._allocator.take()
        return Pfn(extent * EXTENT_PAGES + within)

    def close(self) -> None:
        """Give all extents back."""
        for extent in self._extents.values():
            self._allocator.give_back(extent)
        self._extents.clear()
