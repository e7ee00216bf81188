"""Which pages are converted along with those that were asked for: neighbours that have nothing to lose.

A guest that uses memory for the first time touches page after page, and each conversion is a round trip to memfs. So,
as a fault on absent shared memory does (mmu/fault_around.py), a conversion to private takes the aligned **granule**
around it along, and twice as much as before if it begins where the last one ended, up to 2 MiB. With a granule of a
page nothing but that page is converted.

A conversion destroys content, so only pages that are in neither file are taken along. Rejected: rounding every request
to the granule, which would lose what a guest keeps in the neighbourhood; and to shared, where there is nothing to be
gained, since a page that is in neither file is shared already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kvmsim.slots.memslots import Memslot
from memfs.contract.sparse import allocated_pages, data_pages
from memfs.contract.units import PAGE_SIZE, PageIndex, PageRange, bytes_to_pages

GRANULES: Final = (PAGE_SIZE, 16 * PAGE_SIZE, 512 * PAGE_SIZE)  #: bytes
_LARGEST: Final = bytes_to_pages(GRANULES[-1])


class Around:
    """Windows around pages of one slot. `granule` is in bytes. Raises ValueError for one that is not of GRANULES."""

    def __init__(self, slot: Memslot, granule: int) -> None:
        if granule not in GRANULES:
            raise ValueError(f"a granule of {granule} bytes; there are {GRANULES}")
        self._slot: Final = slot
        self._granule: Final = bytes_to_pages(granule)  # pages
        self._last = self._granule
        self._expected = -1  # where a sequential guest goes on

    def empty_neighbours(self, asked: PageRange) -> list[PageRange]:
        """Return which pages around those that are about to become private are in neither file, in order.

        Where shared memory has content is asked of the backing file, which is on no mount, so that nobody is waited
        for. Where it has no pages at all, as most often, that is asked first: SEEK_DATA walks over all that was
        allocated and never written, to the next data.
        """
        if len(asked) >= self._granule:
            return []
        window = self._window(asked)
        private, shared = self._slot.private, self._slot.shared
        assert private is not None
        assert private.page_map is not None
        assert shared is not None
        written = data_pages(shared.fd, window) if allocated_pages(shared.fd, window) else ()
        return without(window, [asked, *private.page_map.runs(window), *written])

    def _window(self, asked: PageRange) -> PageRange:
        is_sequential = asked.start == self._expected
        size = min(2 * self._last, _LARGEST) if is_sequential else self._granule
        start = asked.start if is_sequential else asked.start // size * size
        end = max(start + size, -(-asked.end // self._granule) * self._granule)
        window = PageRange(PageIndex(start), PageIndex(end)).intersect(self._slot.pages)
        assert window is not None
        self._last, self._expected = size, window.end
        return window


def merged(ranges: Iterable[PageRange]) -> list[PageRange]:
    """Return ranges in order, with those that overlap or touch as one.

    >>> merged([PageRange(PageIndex(4), PageIndex(6)), PageRange(PageIndex(1), PageIndex(4))])
    [PageRange(start=1, end=6)]
    """
    found: list[PageRange] = []
    for each in sorted(ranges, key=lambda each: each.start):
        if found and each.start <= found[-1].end:
            found[-1] = PageRange(found[-1].start, max(found[-1].end, each.end))
        else:
            found.append(each)
    return found


def without(whole: PageRange, taken: Iterable[PageRange]) -> list[PageRange]:
    """Return what is left of a range.

    >>> without(PageRange(PageIndex(0), PageIndex(9)), [PageRange(PageIndex(2), PageIndex(4))])
    [PageRange(start=0, end=2), PageRange(start=4, end=9)]
    """
    found, position = [], whole.start
    for each in merged(taken):
        if position < each.start:
            found.append(PageRange(position, min(each.start, whole.end)))
        position = max(position, each.end)
    if position < whole.end:
        found.append(PageRange(position, whole.end))
    return found
