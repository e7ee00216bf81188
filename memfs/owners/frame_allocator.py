"""Allocation of frame numbers, in extents (contract/frame_numbers.py says what they are)."""

from __future__ import annotations

import errno
import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from memfs.contract.frame_numbers import EXTENT_PAGES, MAX_EXTENTS
from memfs.contract.units import PageIndex, Pfn


class FrameAllocator:
    """An allocator of extents. The lowest free one is allocated first."""

    def __init__(self) -> None:
        self._next = 1
        self._free: list[int] = []

    def allocate(self) -> int:
        """Allocate an extent and return its number. Raises OSError(ENOMEM) when there is none."""
        if self._free:
            return heapq.heappop(self._free)
        if self._next >= MAX_EXTENTS:
            raise OSError(errno.ENOMEM, "all frame numbers are taken")
        self._next += 1
        return self._next - 1

    def restore(self, extents: Iterable[int]) -> None:
        """Allocate just these extents. None is allocated yet."""
        taken = set(extents)
        self._next = max(taken, default=0) + 1
        self._free = [extent for extent in range(1, self._next) if extent not in taken]

    def free(self, extent: int) -> None:
        """Free an extent."""
        heapq.heappush(self._free, extent)

    @property
    def allocated(self) -> int:
        """How many extents are allocated."""
        return self._next - 1 - len(self._free)


class FileFrames:
    """The extents of one registration, perhaps such as are allocated already. `changed` hears of each that comes."""

    def __init__(
        self,
        allocator: FrameAllocator,
        extents: Mapping[int, int] | None = None,
        changed: Callable[[int], None] = lambda gibibyte: None,
    ) -> None:
        self._allocator: Final = allocator
        self._changed: Final = changed
        self.extents: Final[dict[int, int]] = dict(extents or {})  #: by the page's gibibyte in the file

    def pfn(self, index: PageIndex) -> Pfn:
        """Return the frame of a page. Raises OSError(ENOMEM).

        An extent is allocated with the first page of a gibibyte.
        """
        gibibyte, within = divmod(index, EXTENT_PAGES)
        extent = self.extents.get(gibibyte)
        if extent is None:
            extent = self.extents[gibibyte] = self._allocator.allocate()
            self._changed(gibibyte)
        return Pfn(extent * EXTENT_PAGES + within)

    def close(self) -> None:
        """Free all extents."""
        for extent in self.extents.values():
            self._allocator.free(extent)
        self.extents.clear()
