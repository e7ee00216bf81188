"""Which holes of one file the kernel's page cache may have: pages that it read as holes and has not written since.

A set of page indexes, kept as bits: an integer for each group of 512 pages of which there are any. What it takes is
bounded by the number of groups; a file that would have more is `unknown`, and any hole of it may be in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Final

from memfs.contract.units import PageIndex, PageRange

_GROUP: Final = 512  # pages
_RUNS_AT_ONCE: Final = 256


class CachedHoles:
    """Pages of one file. At most `most_groups` groups of 512 pages may have any. `user`: who has read the first."""

    __slots__ = ("_groups", "_most_groups", "changes", "unknown", "user")

    def __init__(self, most_groups: int, user: int = 0) -> None:
        self._most_groups: Final = most_groups
        self.user: Final = user
        self._groups: Final[dict[int, int]] = {}  # bits of the pages in a group; never none
        self.changes = 0  #: how often pages were added or discarded
        self.unknown = False  #: whether there were too many to remember

    def __len__(self) -> int:
        """Return the number of groups, which is what the set takes of memory."""
        return len(self._groups)

    def add(self, pages: PageRange, more_groups: int = sys.maxsize) -> None:
        """Add pages, or forget all of them and be `unknown`: also if that would take more than `more_groups`."""
        self.changes += 1
        if self.unknown:
            return
        most = min(self._most_groups, len(self._groups) + more_groups)
        for index, bits in _by_group(pages):
            self._groups[index] = self._groups.get(index, 0) | bits
            if len(self._groups) > most:
                self._groups.clear()
                self.unknown = True
                return

    def discard(self, pages: PageRange) -> None:
        """Remove pages that are no holes any more, or not in the cache."""
        self.changes += 1
        for index, bits in _by_group(pages):
            left = self._groups.get(index, 0) & ~bits
            if left:
                self._groups[index] = left
            else:
                self._groups.pop(index, None)

    def count(self, pages: PageRange) -> int:
        """Return how many pages of a range it has."""
        return sum(bits.bit_count() for _, bits in self._groups_in(pages))

    def first_runs(self, pages: PageRange) -> list[PageRange]:
        """Return the first runs of the pages in a range: more than that would take too long at once."""
        return list(islice(self.runs(pages), _RUNS_AT_ONCE))

    def runs(self, pages: PageRange) -> Iterator[PageRange]:
        """Generate runs of the pages in a range, in order, none longer than a group. Nothing may change meanwhile."""
        for index, bits in self._groups_in(pages):
            position = index * _GROUP
            while bits:
                zeros = (bits & -bits).bit_length() - 1
                bits >>= zeros
                ones = (~bits & (bits + 1)).bit_length() - 1
                bits >>= ones
                yield PageRange(PageIndex(position + zeros), PageIndex(position + zeros + ones))
                position += zeros + ones

    def _groups_in(self, pages: PageRange) -> list[tuple[int, int]]:
        """Return the groups that overlap a range, in order, and the bits of those pages in each."""
        if len(pages) // _GROUP < len(self._groups):
            return [(index, self._groups[index] & bits) for index, bits in _by_group(pages) if index in self._groups]
        first, last = pages.start // _GROUP, (pages.end - 1) // _GROUP
        indexes = sorted(index for index in self._groups if first <= index <= last)
        return [(index, self._groups[index] & _bits_in(index, pages)) for index in indexes]


def _by_group(pages: PageRange) -> Iterator[tuple[int, int]]:
    """Generate the groups of a range of pages, and the bits of those in each."""
    for index in range(pages.start // _GROUP, (pages.end - 1) // _GROUP + 1):
        yield index, _bits_in(index, pages)


def _bits_in(index: int, pages: PageRange) -> int:
    """Return the bits of those pages that are in one group, which overlaps them."""
    start, end = max(0, pages.start - index * _GROUP), min(_GROUP, pages.end - index * _GROUP)
    return (1 << end) - (1 << start)
