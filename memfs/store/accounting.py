"""The pages that a tracked file has, and the account of them.

The page map says which pages there are; the backing, how many there may be in all. Both change together, in here, next
to the system call that allocates or frees: first space is reserved, then pages are allocated, then the reservation is
committed, which enters them in the map; and when pages have been freed, they leave the map and their space is free.

A map takes two descriptors and address space. So a file has one open only while it is held and its pages matter. Of a
file that nobody holds it is closed; if it would be gone then (contract/page_map.py: MapMemfds), the runs of allocated
pages are kept instead, if they are few and quickly found.
"""

from __future__ import annotations

import errno
import itertools
from typing import Final

from memfs.contract.page_map import ABSENT, ALLOCATED, MAX_PAGES, PageMap
from memfs.contract.page_ranges import PageRanges
from memfs.contract.units import ByteOffset, PageIndex, PageRange, page_offset
from memfs.store.backing import Backing

MAP_END: Final = PageIndex(MAX_PAGES)
_MOST_RUNS: Final = 256  # that are kept in place of a map
_MOST_BYTES: Final = 1 << 20  # of a map that is read when it is put away: 4 GiB of a file
_WHOLE: Final = PageRange(PageIndex(0), MAP_END)


class Accounting:
    """Which pages one file has. Raises OSError(EFBIG) for pages that no map can hold."""

    __slots__ = ("_backing", "_name", "_page_map", "_runs", "pages")

    def __init__(self, backing: Backing, name: str) -> None:
        self._backing: Final = backing
        self._name: Final = name
        self._page_map: PageMap | None = None
        self._runs: tuple[PageRange, ...] = ()  # what the map shows, while there is none
        self.pages = 0  #: how many pages the map shows

    @property
    def page_map(self) -> PageMap:
        """The page map, which is opened if it is not. Raises OSError: EMFILE, ENOSPC."""
        return self.take_out()

    def take_out(self) -> PageMap:
        """Return the page map, and open it if it is not. Raises OSError: EMFILE, ENOSPC."""
        if self._page_map is None:
            self._page_map = self._backing.page_maps.open(self._name)
            for run in self._runs:
                self._page_map.set(run, ALLOCATED)
            self._runs = ()
        return self._page_map

    def recover(self) -> None:
        """Count what the map shows that another process has left."""
        if self._backing.page_maps.exists(self._name):
            page_map = self.take_out()
            page_map.settle()
            self.pages = page_map.count(_WHOLE)

    def open_for_owner(self) -> int:
        """Return a descriptor of the page map for an owner. Raises OSError: EMFILE, ENOSPC."""
        return self._backing.page_maps.open_for_owner(self._name, self.page_map)

    def put_away(self, *, is_given_out: bool = False) -> None:
        """Keep what the map shows without descriptors, unless that takes long. Nobody may use it.

        If it is given out, an owner has it mapped, or may have it still when this process has another's place.
        """
        page_map, maps = self._page_map, self._backing.page_maps
        if page_map is None:
            return
        if not maps.are_kept:
            runs: tuple[PageRange, ...] = ()
            if self.pages:
                if page_map.nbytes > _MOST_BYTES:
                    return
                runs = tuple(itertools.islice(page_map.runs(_WHOLE), _MOST_RUNS + 1))
                if len(runs) > _MOST_RUNS:
                    return
            self._runs = runs
        maps.close(page_map)
        self._page_map = None
        if not self.pages and not is_given_out:
            maps.remove(self._name)

    def reserve(self, pages: PageRange) -> Reservation:
        """Reserve space for the absent ones of some pages, within a with statement. Raises OSError(ENOSPC)."""
        self.check_size(pages.end)
        return self.reserve_absent(len(pages) - self.count(pages))

    def reserve_absent(self, absent: int, given: int = 0) -> Reservation:
        """Reserve space for so many pages that are absent, likewise; `given` as for `Backing.reserve`."""
        self._backing.reserve(absent, given)
        return Reservation(self, self._backing, absent)

    def count(self, pages: PageRange | PageRanges) -> int:
        """Return how many of some pages there are."""
        if isinstance(pages, PageRange):
            return self.page_map.count(pages)
        return self.page_map.count_all(pages)

    def enter(self, pages: PageRange | PageRanges, state: int, *, all_change: bool = False) -> int:
        """Enter pages in the map as ALLOCATED or ABSENT. Returns how many more there are now.

        `all_change`: the caller knows that none of them is in that state.
        """
        size = len(pages) if isinstance(pages, PageRange) else pages.pages
        before = self.count(pages) if not all_change else size if state == ABSENT else 0
        if state == ABSENT and not before:  # to write so would allocate pages of map
            return 0
        if isinstance(pages, PageRange):
            self.page_map.set(pages, state)
        else:
            self.page_map.set_all(pages, state)
        more = size - before if state == ALLOCATED else -before
        self.pages += more
        return more

    def forget(self, pages: PageRange | PageRanges = _WHOLE, *, all_change: bool = False) -> None:
        """Account for pages that were freed. `all_change` as for `enter`."""
        tracked = pages.intersect(_WHOLE) if isinstance(pages, PageRange) else pages
        if not self.pages:
            self._backing.unreserve(0)
        elif tracked is not None:
            self._backing.unreserve(-self.enter(tracked, ABSENT, all_change=all_change))

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
        self._backing.unreserve(self.pages)
        self.pages, self._runs = 0, ()
        if self._page_map is not None:
            self._backing.page_maps.close(self._page_map)
        self._backing.page_maps.remove(self._name)

    def check(self, pages: int, *, exactly: bool) -> None:
        """Raise AssertionError unless the map says what the file has; if not `exactly`, an owner may have added to it.

        Costs time proportional to the file's pages.
        """
        is_open, page_map = self._page_map is not None, self.page_map
        mapped = page_map.count(_WHOLE)
        assert mapped == self.pages, f"{mapped} pages in the map, {self.pages} counted"
        assert mapped == pages or (mapped < pages and not exactly), f"{mapped} pages in the map, {pages} in the backing"
        assert page_map.seq % 2 == 0, "page map left in the middle of a change"
        if not is_open:
            self.put_away(is_given_out=not exactly)


class Reservation:
    """Space that was reserved for pages. What is committed stays; the rest is unreserved at the end."""

    __slots__ = ("_accounting", "_backing", "_left")

    def __init__(self, accounting: Accounting, backing: Backing, pages: int) -> None:
        self._accounting: Final = accounting
        self._backing: Final = backing
        self._left = pages

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Unreserve what was not committed."""
        if self._left:
            self._backing.unreserve(self._left)

    def commit(self, pages: PageRange | PageRanges, *, all_change: bool = False) -> None:
        """Account for some of the pages, which are allocated now. `all_change` as for `Accounting.enter`."""
        # A write may have come first to some of them while the call ran in a thread.
        self._left -= self._accounting.enter(pages, ALLOCATED, all_change=all_change)
