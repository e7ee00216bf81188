"""The pages that a tracked file has, and the account of them.

The page map says which pages there are; the backing, how many there may be in all. Both change together, in here, next
to the system call that allocates or frees: first space is reserved, then pages are allocated, then the reservation is
committed, which enters them in the map; and when pages have been freed, they leave the map and their space is free.
"""

from __future__ import annotations

import errno
from typing import Final

from memfs.contract.page_map import ABSENT, ALLOCATED, MAX_PAGES
from memfs.contract.units import ByteOffset, PageIndex, PageRange, page_offset
from memfs.store.backing import Backing

MAP_END: Final = PageIndex(MAX_PAGES)
_WHOLE: Final = PageRange(PageIndex(0), MAP_END)


class Accounting:
    """Which pages one file has. Raises OSError(EFBIG) for pages that no map can hold."""

    __slots__ = ("_backing", "page_map", "pages")

    def __init__(self, backing: Backing, name: str) -> None:
        self._backing: Final = backing
        self.page_map: Final = backing.page_maps.create(name)
        self.pages = 0  #: how many pages the map shows

    def reserve(self, pages: PageRange) -> Reservation:
        """Reserve space for the absent pages of a range, within a with statement. Raises OSError(ENOSPC)."""
        self.check_size(pages.end)
        return Reservation(self, self._backing, pages)

    def forget(self, pages: PageRange = _WHOLE) -> None:
        """Account for pages that were freed."""
        tracked = pages.intersect(_WHOLE)
        if tracked is not None:
            count = self.page_map.count(tracked)
            self.page_map.set(tracked, ABSENT)
            self.pages -= count
            self._backing.unreserve(count)

    def space_for(self, offset: ByteOffset, length: int) -> int:
        """Return how many of `length` bytes (at least one) from `offset` on can be written before memory runs out."""
        pages = PageRange.covering(offset, length)
        self.check_size(pages.end)
        free = self._backing.free_pages
        for run in self.page_map.runs(pages, ABSENT):
            if len(run) > free:
                return max(0, page_offset(PageIndex(run.start + free)) - offset)
            free -= len(run)
        return length

    def check_size(self, pages: PageIndex) -> None:
        """Raise OSError(EFBIG) if a file of so many pages is larger than a map."""
        if pages > MAP_END:
            raise OSError(errno.EFBIG, "larger than a page map")

    def close(self) -> None:
        """Account for a file that was freed."""
        self.forget()
        self._backing.page_maps.close(self.page_map)

    def check(self, pages: int, *, exactly: bool) -> None:
        """Raise AssertionError unless the map says what the file has; if not `exactly`, an owner may have added to it.

        Costs time proportional to the file's pages.
        """
        mapped = self.page_map.count(_WHOLE)
        assert mapped == self.pages, f"{mapped} pages in the map, {self.pages} counted"
        assert mapped == pages or (mapped < pages and not exactly), f"{mapped} pages in the map, {pages} in the backing"
        assert self.page_map.seq % 2 == 0, "page map left in the middle of a change"


class Reservation:
    """Space that was reserved for pages. What is committed stays; the rest is unreserved at the end."""

    __slots__ = ("_accounting", "_backing", "_left")

    def __init__(self, accounting: Accounting, backing: Backing, pages: PageRange) -> None:
        self._accounting: Final = accounting
        self._backing: Final = backing
        self._left = len(pages) - accounting.page_map.count(pages)
        backing.reserve(self._left)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self._backing.unreserve(self._left)

    def commit(self, pages: PageRange) -> None:
        """Account for some of the pages, which are allocated now."""
        # A write may have come first to some of them while the call ran in a thread.
        added = len(pages) - self._accounting.page_map.count(pages)
        self._left -= added
        self._accounting.pages += added
        self._accounting.page_map.set(pages, ALLOCATED)
